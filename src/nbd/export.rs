//! Exports: what clients can ask for by name, and the table of them.
//!
//! An [`Export`] is immutable once made; a reload makes a new [`ExportTable`] that shares the unchanged exports, has others
//! made again over the same backend ([`Export::remade`]), and swaps it in through [`Exports`]. A session keeps the `Arc` of the export it chose, so it never sees a change
//! in mid-flight. The size is asked of the backend at each request: it may grow under a client.
//!
//! Any thread; nothing here yields.

use super::access::AllowList;
use super::meta::ContextKind;
use super::proto::{HeaderStyle, MAX_PAYLOAD, NBD_MAX_STRING, TransmissionFlags};
use super::wire::BlockSizes;
use crate::block::{BlockBackend, BlockNode};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Why an export or a table cannot be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExportError {
    /// Name or description too long or with a NUL.
    #[error("export {what} must be at most {NBD_MAX_STRING} bytes and must not contain NUL")]
    BadString {
        /// "name" or "description".
        what: &'static str,
    },
    /// Block sizes that the protocol forbids.
    #[error(
        "export '{name}': minimum block size {min} must be a power of two up to 65536, the preferred size a power of two of at least 512 and the minimum, the maximum a multiple of the minimum, at least the preferred size and at most 64 MiB"
    )]
    BadBlockSizes {
        /// The export.
        name: String,
        /// Its minimum.
        min: u32,
    },
    /// A dirty bitmap that the image does not have.
    #[error("export '{export}': the image has no dirty bitmap '{bitmap}'; {}", exist(there))]
    NoSuchBitmap {
        /// The export.
        export: String,
        /// What was asked for.
        bitmap: String,
        /// Those that exist.
        there: Vec<String>,
    },
    /// A dirty bitmap whose context would have a name that the protocol forbids.
    #[error("export '{export}': the name of the dirty bitmap '{bitmap}' is too long or contains NUL")]
    BadBitmapName {
        /// The export.
        export: String,
        /// The bitmap.
        bitmap: String,
    },
    /// Two exports with one name.
    #[error("two exports are named '{0}'")]
    Duplicate(String),
    /// The default names no export of the table.
    #[error("the default export '{0}' does not exist")]
    NoSuchDefault(String),
}

fn exist(bitmaps: &[String]) -> String {
    if bitmaps.is_empty() {
        return "it has none".to_owned();
    }
    format!("it has '{}'", bitmaps.join("', '"))
}

/// What an export is to be; see the fields' defaults.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Name that clients ask for; "" is the default export.
    pub name: String,
    /// Text for people, shown by `nbdinfo` and `nbd-client -l`; may be empty.
    pub description: String,
    /// Refuse writes; implied by a read-only backend.
    pub read_only: bool,
    /// Do not set `NBD_FLAG_CAN_MULTI_CONN`. It is set otherwise, also for writers: all connections share one
    /// backend, so a flush on one covers all.
    pub no_multi_conn: bool,
    /// Smallest block in bytes to advertise; `None`: 1. Unaligned requests work all the same.
    pub min_block: Option<u32>,
    /// Preferred block in bytes; `None`: what the backend prefers, at least 4096.
    pub preferred_block: Option<u32>,
    /// Longest payload in bytes to advertise; `None`: [`MAX_PAYLOAD`], which is also what is accepted whatever is said here.
    pub max_block: Option<u32>,
    /// On a server where TLS is a choice: only clients that chose it get this export.
    pub tls_required: bool,
    /// Who may use it; `None`: every client.
    pub allow: Option<AllowList>,
    /// Offer the metadata context `qemu:allocation-depth`: which layer of a backing chain holds what.
    pub allocation_depth: bool,
    /// Dirty bitmaps of the image to offer as `qemu:dirty-bitmap:NAME`.
    pub bitmaps: Vec<String>,
    /// Most connections at a time; `None`: no limit but the server's.
    pub max_connections: Option<usize>,
    /// Do not tell clients that the medium spins.
    pub hide_rotational: bool,
    /// Tell block sizes also to clients that did not ask for them: as `NBD_OPT_GO` finds them, with a smallest block of 1,
    /// since they cannot know better; and `NBD_OPT_INFO` asks them to ask if the smallest is another. That is what
    /// QEMU does, and its clients count on it.
    pub sizes_unasked: bool,
}

/// One export: a name for a backend, and what is promised about it.
pub struct Export {
    name: String,
    description: String,
    backend: Arc<BlockBackend>,
    flags: TransmissionFlags,
    sizes: BlockSizes,
    sizes_unasked: bool,
    tls_required: bool,
    allow: Option<AllowList>,
    contexts: Vec<ContextKind>,
    max_connections: Option<usize>,
    /// Shared with those that were made of it again.
    connections: Arc<AtomicUsize>,
}

/// The right to use an export, as one of the connections that it may have; given back on drop.
#[derive(Debug)]
pub struct Admission {
    export: Arc<Export>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.export.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Export {
    /// Makes an export of `backend`.
    ///
    /// # Errors
    /// Strings and block sizes that the protocol does not allow; bitmaps that the image does not have.
    pub fn new(options: ExportOptions, backend: Arc<BlockBackend>) -> Result<Arc<Export>, ExportError> {
        Export::make(options, backend, Arc::default())
    }

    /// Makes an export of the same backend with other options, for clients that connect later. Those that are connected keep
    /// theirs, and count as connections of both.
    ///
    /// # Errors
    /// As [`Export::new`].
    pub fn remade(&self, options: ExportOptions) -> Result<Arc<Export>, ExportError> {
        Export::make(options, Arc::clone(&self.backend), Arc::clone(&self.connections))
    }

    fn make(
        options: ExportOptions,
        backend: Arc<BlockBackend>,
        connections: Arc<AtomicUsize>,
    ) -> Result<Arc<Export>, ExportError> {
        let string_ok = |s: &str| s.len() <= NBD_MAX_STRING && !s.contains('\0');
        if !string_ok(&options.name) {
            return Err(ExportError::BadString { what: "name" });
        }
        if !string_ok(&options.description) {
            return Err(ExportError::BadString { what: "description" });
        }
        let limits = backend.root().limits();
        let min = options.min_block.unwrap_or(1);
        let max = options.max_block.unwrap_or(MAX_PAYLOAD);
        let preferred = options
            .preferred_block
            .unwrap_or_else(|| limits.preferred.max(4096).max(min).min(max).next_power_of_two());
        let sizes = BlockSizes { min, preferred, max };
        let sizes_ok = min.is_power_of_two()
            && min <= 65_536
            && preferred.is_power_of_two()
            && preferred >= min.max(512)
            && max >= preferred
            && max <= MAX_PAYLOAD
            && max.is_multiple_of(min);
        if !sizes_ok {
            return Err(ExportError::BadBlockSizes { name: options.name, min });
        }

        let mut contexts = vec![ContextKind::BaseAllocation];
        if options.allocation_depth {
            contexts.push(ContextKind::AllocationDepth);
        }
        for (i, name) in options.bitmaps.iter().enumerate() {
            if options.bitmaps[..i].contains(name) {
                continue;
            }
            let there = backend.root().dirty_bitmaps();
            let Some(bitmap) = there.iter().find(|b| b.name() == name) else {
                return Err(ExportError::NoSuchBitmap {
                    export: options.name,
                    bitmap: name.clone(),
                    there: there.iter().map(|b| b.name().to_owned()).collect(),
                });
            };
            let context = ContextKind::dirty_bitmap(bitmap.clone());
            if !string_ok(context.name()) {
                return Err(ExportError::BadBitmapName { export: options.name, bitmap: name.clone() });
            }
            contexts.push(context);
        }

        let mut flags = TransmissionFlags::NBD_FLAG_HAS_FLAGS
            | TransmissionFlags::NBD_FLAG_SEND_FLUSH
            | TransmissionFlags::NBD_FLAG_SEND_FUA
            | TransmissionFlags::NBD_FLAG_SEND_CACHE;
        if options.read_only || backend.root().read_only() {
            flags |= TransmissionFlags::NBD_FLAG_READ_ONLY;
        } else {
            // FAST_ZERO is offered whether or not the node is ever fast: NBD_ENOTSUP at once is an answer too.
            flags |= TransmissionFlags::NBD_FLAG_SEND_TRIM
                | TransmissionFlags::NBD_FLAG_SEND_WRITE_ZEROES
                | TransmissionFlags::NBD_FLAG_SEND_FAST_ZERO;
        }
        flags.set(TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN, !options.no_multi_conn);
        flags.set(TransmissionFlags::NBD_FLAG_ROTATIONAL, limits.rotational && !options.hide_rotational);
        Ok(Arc::new(Export {
            name: options.name,
            description: options.description,
            backend,
            flags,
            sizes,
            sizes_unasked: options.sizes_unasked,
            tls_required: options.tls_required,
            allow: options.allow,
            contexts,
            max_connections: options.max_connections,
            connections,
        }))
    }

    /// The canonical name, as listed.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Text for people; may be empty.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// What holds the data.
    #[must_use]
    pub fn backend(&self) -> &Arc<BlockBackend> {
        &self.backend
    }

    /// The root node of the backend.
    #[must_use]
    pub fn node(&self) -> &Arc<dyn BlockNode> {
        self.backend.root()
    }

    /// Size in bytes, now.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.backend.len()
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.flags.contains(TransmissionFlags::NBD_FLAG_READ_ONLY)
    }

    /// Transmission flags for a client that has negotiated this style of headers, and has selected metadata contexts
    /// of this export or has not.
    #[must_use]
    pub fn flags(&self, style: HeaderStyle, has_contexts: bool) -> TransmissionFlags {
        let mut flags = self.flags;
        flags.set(TransmissionFlags::NBD_FLAG_SEND_DF, style >= HeaderStyle::Structured);
        let filter = style == HeaderStyle::Extended && has_contexts;
        flags.set(TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD, filter);
        flags
    }

    /// Whether it takes TLS to get this export where TLS is a choice.
    #[must_use]
    pub fn tls_required(&self) -> bool {
        self.tls_required
    }

    /// Who may use it; `None`: every client.
    #[must_use]
    pub fn allow(&self) -> Option<&AllowList> {
        self.allow.as_ref()
    }

    /// The metadata contexts that clients may select, in a fixed order.
    #[must_use]
    pub fn contexts(&self) -> &[ContextKind] {
        &self.contexts
    }

    /// Counts one more connection, unless there are as many as there may be.
    #[must_use]
    pub fn admit(self: &Arc<Export>) -> Option<Admission> {
        let max = self.max_connections.unwrap_or(usize::MAX);
        let more = |n: usize| (n < max).then(|| n + 1);
        let admitted = self.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        admitted.is_ok().then(|| Admission { export: self.clone() })
    }

    /// Connections that use it now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Block size constraints to advertise.
    #[must_use]
    pub fn block_sizes(&self) -> BlockSizes {
        self.sizes
    }

    /// Whether clients that did not ask for block sizes are told them; see [`ExportOptions::sizes_unasked`].
    #[must_use]
    pub fn sizes_unasked(&self) -> bool {
        self.sizes_unasked
    }
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).field("flags", &self.flags).finish_non_exhaustive()
    }
}

/// The exports of a server at one moment, in the order of the configuration.
#[derive(Debug, Default)]
pub struct ExportTable {
    list: Vec<Arc<Export>>,
    by_name: HashMap<String, usize>,
    default: Option<usize>,
}

impl ExportTable {
    /// Makes a table. `default_name` names the export that a client gets who asks for ""; without it that is the
    /// export named "", else the only export there is.
    ///
    /// # Errors
    /// `Duplicate`, `NoSuchDefault`.
    pub fn new(list: Vec<Arc<Export>>, default_name: Option<&str>) -> Result<Arc<ExportTable>, ExportError> {
        let mut by_name = HashMap::with_capacity(list.len());
        for (i, export) in list.iter().enumerate() {
            if by_name.insert(export.name.clone(), i).is_some() {
                return Err(ExportError::Duplicate(export.name.clone()));
            }
        }
        let default = match default_name {
            Some(name) => match by_name.get(name) {
                Some(i) => Some(*i),
                None => return Err(ExportError::NoSuchDefault(name.to_owned())),
            },
            None => by_name.get("").copied().or((list.len() == 1).then_some(0)),
        };
        Ok(Arc::new(ExportTable { list, by_name, default }))
    }

    /// Finds an export by the name that a client sent. An export really named "" wins over the default.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Arc<Export>> {
        match self.by_name.get(name) {
            Some(i) => Some(&self.list[*i]),
            None if name.is_empty() => self.default.map(|i| &self.list[i]),
            None => None,
        }
    }

    /// All exports, in the order of the configuration.
    #[must_use]
    pub fn list(&self) -> &[Arc<Export>] {
        &self.list
    }
}

/// The current table of a running server; swapped as a whole. Sessions look names up in it and keep what they found.
#[derive(Debug)]
pub struct Exports {
    current: RwLock<Arc<ExportTable>>,
}

impl Exports {
    /// Begins with `table`.
    #[must_use]
    pub fn new(table: Arc<ExportTable>) -> Exports {
        Exports { current: RwLock::new(table) }
    }

    /// The table of this moment.
    #[must_use]
    pub fn snapshot(&self) -> Arc<ExportTable> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another table in place; returns the old one. Clients that are connected keep their export.
    pub fn replace(&self, table: Arc<ExportTable>) -> Arc<ExportTable> {
        std::mem::replace(&mut *self.current.write().unwrap_or_else(PoisonError::into_inner), table)
    }
}
