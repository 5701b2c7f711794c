//! What can be wrong with the bytes of a qcow2 image, and big-endian access that cannot run off a buffer.

#![deny(clippy::arithmetic_side_effects)]

/// What is wrong with an image's bytes. The texts name the field, where it stands, and its value; whoever reports it
/// adds the image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The magic does not say qcow2.
    #[error("not a qcow2 image: the file does not begin with \"QFI\\xfb\"")]
    NotQcow2,
    /// A version that nobody defined, or version 1.
    #[error("qcow version {0} is not supported, only 2 and 3 are")]
    Version(u32),
    /// A field has a value that it must not have.
    #[error("{structure}: {field} (bytes {bytes}) is {value:#x}: {rule}")]
    Field {
        /// "header", "snapshot table entry 3", …
        structure: String,
        /// Name in the document.
        field: &'static str,
        /// Its place within the structure, as the document counts: "20-23".
        bytes: &'static str,
        /// What it says.
        value: u64,
        /// What it should.
        rule: &'static str,
    },
    /// A structure ends before its bytes do.
    #[error("{structure} is cut off: needs {need} bytes, has {have}")]
    Truncated {
        /// Which.
        structure: String,
        /// Bytes that it says it has.
        need: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// Incompatible feature bits that this version does not know; named by the image's own feature name table.
    #[error("the image needs features that this version does not know: {}", names.join(", "))]
    UnknownFeatures {
        /// "bit 5 (name)".
        names: Vec<String>,
    },
    /// Known, but not implemented.
    #[error("{what} is not supported; {hint}")]
    Unsupported {
        /// Feature.
        what: &'static str,
        /// What to do instead.
        hint: &'static str,
    },
    /// A header extension is wrong.
    #[error("header extension {magic:#010x} ({name}) at byte {offset}: {problem}")]
    Extension {
        /// Its type.
        magic: u32,
        /// What the type is called.
        name: &'static str,
        /// Where its type stands in the file.
        offset: usize,
        /// What is wrong.
        problem: String,
    },
    /// An entry of an L1, L2, refcount or bitmap table is wrong.
    #[error("{table} entry {raw:#018x}: {rule}")]
    Entry {
        /// Kind of table.
        table: &'static str,
        /// The entry.
        raw: u64,
        /// What it should be.
        rule: &'static str,
    },
    /// A compressed cluster does not hold what it must.
    #[error("compressed cluster: {0}")]
    Compressed(String),
    /// What is to be written does not fit where it must go.
    #[error("{what} does not fit: needs {need} bytes, there is room for {room}")]
    NoRoom {
        /// What.
        what: &'static str,
        /// Bytes needed.
        need: u64,
        /// Bytes there.
        room: u64,
    },
}

impl FormatError {
    /// The errno that a request gets which ran into it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            FormatError::NotQcow2 | FormatError::Field { .. } | FormatError::Truncated { .. } => libc::EINVAL,
            FormatError::Version(_)
            | FormatError::UnknownFeatures { .. }
            | FormatError::Unsupported { .. } => libc::ENOTSUP,
            FormatError::Extension { .. } => libc::EINVAL,
            FormatError::Entry { .. } | FormatError::Compressed(_) => libc::EIO,
            FormatError::NoRoom { .. } => libc::ENOSPC,
        }
    }
}

/// `N` bytes at `at`.
fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

/// Bytes of a structure that may be shorter than they should be.
pub(super) struct Bytes<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) structure: &'a str,
}

impl<'a> Bytes<'a> {
    fn short(&self, at: usize, n: usize) -> FormatError {
        FormatError::Truncated {
            structure: self.structure.to_owned(),
            need: (at as u64).saturating_add(n as u64),
            have: self.bytes.len() as u64,
        }
    }

    pub(super) fn u8(&self, at: usize) -> Result<u8, FormatError> {
        self.bytes.get(at).copied().ok_or_else(|| self.short(at, 1))
    }

    pub(super) fn u16(&self, at: usize) -> Result<u16, FormatError> {
        array(self.bytes, at).map(u16::from_be_bytes).ok_or_else(|| self.short(at, 2))
    }

    pub(super) fn u32(&self, at: usize) -> Result<u32, FormatError> {
        array(self.bytes, at).map(u32::from_be_bytes).ok_or_else(|| self.short(at, 4))
    }

    pub(super) fn u64(&self, at: usize) -> Result<u64, FormatError> {
        array(self.bytes, at).map(u64::from_be_bytes).ok_or_else(|| self.short(at, 8))
    }

    pub(super) fn slice(&self, at: usize, n: usize) -> Result<&'a [u8], FormatError> {
        self.bytes.get(at..).and_then(|b| b.get(..n)).ok_or_else(|| self.short(at, n))
    }

    pub(super) fn field(
        &self,
        field: &'static str,
        bytes: &'static str,
        value: u64,
        rule: &'static str,
    ) -> FormatError {
        FormatError::Field { structure: self.structure.to_owned(), field, bytes, value, rule }
    }
}
