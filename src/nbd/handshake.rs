//! The handshake phase of a server as a pure state machine: bytes in, bytes and a verdict out.
//!
//! ```text
//!   greeting → client flags → option* ─┬─ GO, EXPORT_NAME → transmission
//!                                      └─ ABORT, violation → close
//! ```
//!
//! [`Handshake::advance`] is given whatever has been received and not been consumed yet; it consumes whole messages and
//! appends replies. It keeps no copy of the input, allocates nothing by a number that the client sent, and never panics
//! on garbage. What one option means is in `option.rs`.

use super::access::{ClientIdentity, TlsMode, TlsPeer};
use super::export::{Admission, Export, ExportTable};
use super::meta::{MetaContext, MetaSelection};
use super::option;
use super::proto::*;
use super::wire::{Greeting, OptionHeader, ProtocolError, put_option_reply};
use std::sync::Arc;

/// What the server says first.
#[must_use]
pub fn greeting() -> [u8; Greeting::LEN] {
    Greeting { flags: HandshakeFlags::all() }.encode()
}

/// The result of a handshake: all that the transmission phase needs to know of it.
#[derive(Debug, Clone)]
pub struct Negotiated {
    /// The chosen export.
    pub export: Arc<Export>,
    /// Transmission flags as told to the client.
    pub flags: TransmissionFlags,
    /// How requests and replies look.
    pub style: HeaderStyle,
    /// Metadata contexts that hold for this export.
    pub contexts: Vec<MetaContext>,
    /// Counts the connection as one of the export's; kept until it ends.
    pub admission: Arc<Admission>,
}

/// Why a handshake ended without an export.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// `NBD_OPT_ABORT`: the client is done.
    #[error("client aborted the negotiation")]
    Abort,
    /// The stream is not, or no longer, the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// Client flags that we did not offer.
    #[error("unknown client flags {0:#010x}")]
    BadClientFlags(u32),
    /// An option other than `NBD_OPT_EXPORT_NAME` without fixed newstyle, which has no replies for it.
    #[error("option {0} needs fixed newstyle")]
    NeedsFixedNewstyle(u32),
    /// `NBD_OPT_EXPORT_NAME` for what cannot be served; that option has no error reply.
    #[error("export name was refused: {0}")]
    ExportName(&'static str),
    /// More data than will be skipped.
    #[error("option {option} has {len} bytes of data")]
    OptionTooLong {
        /// Which.
        option: u32,
        /// Bytes.
        len: u32,
    },
    /// More than [`MAX_OPTIONS`].
    #[error("too many options")]
    TooManyOptions,
    /// More bytes in the clear behind `NBD_OPT_STARTTLS`: they could be meant to be taken for encrypted ones.
    #[error("client sent more behind NBD_OPT_STARTTLS, in the clear")]
    ClearBehindStartTls,
}

/// An export that a client asked for and may not use; for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its name.
    pub export: String,
    /// What the client was told.
    pub why: &'static str,
}

/// What to do after a call of [`Handshake::advance`]. Send the replies first, in every case.
#[derive(Debug)]
pub enum Step {
    /// Receive more: the input holds no whole message.
    NeedInput,
    /// Send the replies and call again: there may be more input, or more to say.
    Again,
    /// Send the replies, and make TLS of the stream; then call [`Handshake::secured`], and go on with what comes through it.
    StartTls,
    /// The handshake is over; what is left of the input are requests.
    Enter(Box<Negotiated>),
    /// Send and close.
    Close(CloseReason),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    /// Discarding the data of an option that is too long; the answer follows it.
    Skip {
        option: u32,
        left: u32,
    },
    /// In the middle of the answer to `NBD_OPT_LIST`.
    List {
        table: Arc<ExportTable>,
        next: usize,
    },
    /// `NBD_OPT_STARTTLS` was granted.
    Tls,
    Over,
}

/// The server's side of one handshake, from the client flags on.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    flags: ClientFlags,
    options: u32,
    tls: TlsMode,
    client: ClientIdentity,
    refusal: Option<Refusal>,
    pub(super) style: HeaderStyle,
    pub(super) meta: MetaSelection,
}

impl Default for Handshake {
    fn default() -> Self {
        Handshake::new()
    }
}

/// How far a list is written in one step, in bytes (ours): the next step follows when the client has taken it.
const LIST_STEP: usize = 64 << 10;

impl Handshake {
    /// Begins, without TLS, with a client of which nothing is known; the [`greeting`] is the caller's to send.
    #[must_use]
    pub fn new() -> Handshake {
        Handshake::with(TlsMode::Off, ClientIdentity::default())
    }

    /// Begins with what is known of the client.
    #[must_use]
    pub fn with(tls: TlsMode, client: ClientIdentity) -> Handshake {
        Handshake {
            state: State::ClientFlags,
            flags: ClientFlags::empty(),
            options: 0,
            tls,
            client,
            refusal: None,
            style: HeaderStyle::Simple,
            meta: MetaSelection::default(),
        }
    }

    /// Whether the client speaks fixed newstyle; before the client flags: no.
    #[must_use]
    pub fn fixed_newstyle(&self) -> bool {
        self.flags.contains(ClientFlags::NBD_FLAG_C_FIXED_NEWSTYLE)
    }

    /// TLS is up: the negotiation begins anew, and all that was negotiated in the clear is forgotten.
    ///
    /// # Panics
    /// When it was not granted.
    pub fn secured(&mut self, peer: TlsPeer) {
        assert!(matches!(self.state, State::Tls), "TLS without NBD_OPT_STARTTLS");
        let fresh = Handshake::with(self.tls, std::mem::take(&mut self.client));
        // The client's flags are no option, and the number of options stays bounded.
        *self = Handshake { state: State::Option, flags: self.flags, options: self.options, ..fresh };
        self.client.tls = Some(Arc::new(peer));
    }

    /// What is known of the client.
    #[must_use]
    pub fn client(&self) -> &ClientIdentity {
        &self.client
    }

    /// The refusal that the last call of [`Handshake::advance`] came to, once.
    pub fn take_refusal(&mut self) -> Option<Refusal> {
        self.refusal.take()
    }

    /// Takes one message off the front of `input` if it is there completely; `*consumed` is set to its bytes. Replies are
    /// appended to `out`. `table` answers questions about exports; during shutdown options are refused.
    ///
    /// # Panics
    /// When called after `Enter` or `Close`.
    pub fn advance(
        &mut self,
        input: &[u8],
        consumed: &mut usize,
        table: &Arc<ExportTable>,
        shutting_down: bool,
        out: &mut Vec<u8>,
    ) -> Step {
        *consumed = 0;
        let step = match &mut self.state {
            State::ClientFlags => self.client_flags(input, consumed),
            State::Option => self.option(input, consumed, table, shutting_down, out),
            State::Skip { option, left } => {
                let n = u32::try_from(input.len()).unwrap_or(u32::MAX).min(*left);
                *consumed = n as usize;
                *left -= n;
                if *left > 0 {
                    return Step::NeedInput;
                }
                let option = *option;
                self.state = State::Option;
                match self.needs_tls_first(option) {
                    true => put_option_reply(out, option, NBD_REP_ERR_TLS_REQD, TLS_FIRST),
                    false => put_option_reply(out, option, NBD_REP_ERR_TOO_BIG, b"option data is too long"),
                }
                Step::Again
            }
            State::List { table, next } => {
                let end = out.len() + LIST_STEP;
                while let Some(export) = table.list().get(*next) {
                    if out.len() >= end {
                        return Step::Again;
                    }
                    // What a client could not use is not listed for it.
                    if refused(export, self.tls, &self.client).is_none() {
                        option::put_list_entry(out, export);
                    }
                    *next += 1;
                }
                put_option_reply(out, NBD_OPT_LIST, NBD_REP_ACK, b"");
                self.state = State::Option;
                Step::Again
            }
            State::Tls => panic!("TLS was granted, and is not up"),
            State::Over => panic!("handshake is over"),
        };
        if matches!(step, Step::Enter(_) | Step::Close(_)) {
            self.state = State::Over;
        }
        step
    }

    fn client_flags(&mut self, input: &[u8], consumed: &mut usize) -> Step {
        let Some(bytes) = input.first_chunk::<4>() else {
            return Step::NeedInput;
        };
        *consumed = 4;
        let bits = u32::from_be_bytes(*bytes);
        match ClientFlags::from_bits(bits) {
            Some(flags) => {
                self.flags = flags;
                self.state = State::Option;
                Step::Again
            }
            None => Step::Close(CloseReason::BadClientFlags(bits)),
        }
    }

    fn option(
        &mut self,
        input: &[u8],
        consumed: &mut usize,
        table: &Arc<ExportTable>,
        shutting_down: bool,
        out: &mut Vec<u8>,
    ) -> Step {
        // A magic that begins wrong will not become right: close before the rest arrives.
        let magic = IHAVEOPT.to_be_bytes();
        let n = input.len().min(magic.len());
        if input[..n] != magic[..n] {
            let mut seen = [0; 8];
            seen[..n].copy_from_slice(&input[..n]);
            return Step::Close(ProtocolError::BadOptionMagic(u64::from_be_bytes(seen)).into());
        }
        let Some(header) = input.first_chunk::<{ OptionHeader::LEN }>() else {
            return Step::NeedInput;
        };
        let OptionHeader { option, len } = match OptionHeader::decode(header) {
            Ok(header) => header,
            Err(e) => return Step::Close(e.into()),
        };
        if !self.fixed_newstyle() && option != NBD_OPT_EXPORT_NAME {
            return Step::Close(CloseReason::NeedsFixedNewstyle(option));
        }
        if option == NBD_OPT_EXPORT_NAME && len as usize > NBD_MAX_STRING {
            return Step::Close(CloseReason::ExportName("name is too long"));
        }
        if len > MAX_OPTION_SKIP {
            return Step::Close(CloseReason::OptionTooLong { option, len });
        }
        if len > MAX_OPTION_LEN {
            *consumed = OptionHeader::LEN;
            self.options += 1;
            self.state = State::Skip { option, left: len };
            return Step::Again;
        }
        let Some(data) = input[OptionHeader::LEN..].get(..len as usize) else {
            return Step::NeedInput;
        };
        *consumed = OptionHeader::LEN + data.len();
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Step::Close(CloseReason::TooManyOptions);
        }
        if shutting_down && option == NBD_OPT_EXPORT_NAME {
            return Step::Close(CloseReason::ExportName("server is shutting down"));
        }
        if shutting_down && option != NBD_OPT_ABORT {
            put_option_reply(out, option, NBD_REP_ERR_SHUTDOWN, b"server is shutting down");
            return Step::Again;
        }
        if self.needs_tls_first(option) {
            if option == NBD_OPT_EXPORT_NAME {
                return Step::Close(CloseReason::ExportName("TLS is required"));
            }
            put_option_reply(out, option, NBD_REP_ERR_TLS_REQD, TLS_FIRST);
            return Step::Again;
        }
        match option {
            NBD_OPT_STARTTLS => self.start_tls(data, input.len() > *consumed, out),
            NBD_OPT_EXPORT_NAME => self.export_name(data, table, out),
            NBD_OPT_LIST if data.is_empty() => {
                self.state = State::List { table: table.clone(), next: 0 };
                Step::Again
            }
            _ => option::answer(self, option, data, table, out),
        }
    }

    fn export_name(&mut self, data: &[u8], table: &ExportTable, out: &mut Vec<u8>) -> Step {
        let export = match self.find(table, data) {
            Ok(export) => export,
            Err((_, why)) => return Step::Close(CloseReason::ExportName(why)),
        };
        if self.style == HeaderStyle::Extended {
            // That option cannot say that it is out of place.
            return Step::Close(CloseReason::ExportName("not after NBD_OPT_EXTENDED_HEADERS"));
        }
        let Some(admission) = export.admit() else {
            return Step::Close(CloseReason::ExportName("it has as many connections as it may have"));
        };
        let negotiated = self.enter(export, admission);
        let reply = super::wire::ExportNameReply { size: negotiated.export.size(), flags: negotiated.flags };
        reply.put(out, self.flags.contains(ClientFlags::NBD_FLAG_C_NO_ZEROES));
        Step::Enter(Box::new(negotiated))
    }

    /// Whether the client must make TLS before anything else.
    fn needs_tls_first(&self, option: u32) -> bool {
        let open = matches!(option, NBD_OPT_STARTTLS | NBD_OPT_ABORT);
        self.tls == TlsMode::Required && self.client.tls.is_none() && !open
    }

    fn start_tls(&mut self, data: &[u8], more: bool, out: &mut Vec<u8>) -> Step {
        let mut refuse = |reply_type, why: &str| {
            put_option_reply(out, NBD_OPT_STARTTLS, reply_type, why.as_bytes());
            Step::Again
        };
        if !data.is_empty() {
            return refuse(NBD_REP_ERR_INVALID, "this option takes no data");
        }
        if self.client.tls.is_some() {
            return refuse(NBD_REP_ERR_INVALID, "TLS is on already");
        }
        if self.tls == TlsMode::Off {
            return refuse(NBD_REP_ERR_UNSUP, "this server does not offer TLS");
        }
        if more {
            return Step::Close(CloseReason::ClearBehindStartTls);
        }
        put_option_reply(out, NBD_OPT_STARTTLS, NBD_REP_ACK, b"");
        self.state = State::Tls;
        Step::StartTls
    }

    /// Finds an export by a name as sent, if the client may use it; else the error reply's type and text.
    pub(super) fn find<'t>(
        &mut self,
        table: &'t ExportTable,
        name: &[u8],
    ) -> Result<&'t Arc<Export>, (u32, &'static str)> {
        let Some(export) = option::find(table, name) else {
            return Err((NBD_REP_ERR_UNKNOWN, "no such export"));
        };
        match refused(export, self.tls, &self.client) {
            None => Ok(export),
            Some((reply_type, why)) => {
                self.refusal = Some(Refusal { export: export.name().to_owned(), why });
                Err((reply_type, why))
            }
        }
    }

    /// The transmission flags that the client is told for `export`, as things stand.
    pub(super) fn flags_of(&self, export: &Arc<Export>) -> TransmissionFlags {
        export.flags(self.style, self.meta.selects_for(export))
    }

    /// Makes the result of a handshake that ends in `export`.
    pub(super) fn enter(&mut self, export: &Arc<Export>, admission: Admission) -> Negotiated {
        Negotiated {
            export: export.clone(),
            flags: self.flags_of(export),
            style: self.style,
            contexts: std::mem::take(&mut self.meta).into_contexts_for(export),
            admission: Arc::new(admission),
        }
    }
}

const TLS_FIRST: &[u8] = b"this server requires TLS: send NBD_OPT_STARTTLS first";

/// Why a client may not use an export, if so: the error reply's type and text.
fn refused(export: &Export, tls: TlsMode, client: &ClientIdentity) -> Option<(u32, &'static str)> {
    if tls == TlsMode::Selective && client.tls.is_none() && export.tls_required() {
        return Some((NBD_REP_ERR_TLS_REQD, "this export requires TLS: send NBD_OPT_STARTTLS first"));
    }
    match export.allow() {
        Some(list) if !list.admits(client) => {
            Some((NBD_REP_ERR_POLICY, "this client is not on the export's allow list"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::export::ExportOptions;
    use super::super::wire::{InfoRequest, MetaContextRequest, OptionReplyHeader, put_option};
    use super::*;
    use crate::block::{BlockBackend, NullNode};
    use proptest::prelude::*;

    fn table(n: usize) -> Arc<ExportTable> {
        let exports = (0..n)
            .map(|i| {
                let options = ExportOptions { name: format!("e{i}"), ..ExportOptions::default() };
                Export::new(options, BlockBackend::new(Arc::new(NullNode::new("n", 1 << 20)))).unwrap()
            })
            .collect();
        ExportTable::new(exports, Some("e0")).unwrap()
    }

    /// Feeds `input` in pieces of `piece` bytes; returns the replies and how it ended, if it did.
    fn feed(input: &[u8], piece: usize, stopping: bool) -> (Vec<u8>, Option<Step>) {
        let table = table(3);
        let mut hs = Handshake::new();
        let (mut buffered, mut out) = (Vec::new(), Vec::new());
        for bytes in input.chunks(piece.max(1)) {
            buffered.extend_from_slice(bytes);
            loop {
                let mut consumed = 0;
                let step = hs.advance(&buffered, &mut consumed, &table, stopping, &mut out);
                assert!(consumed <= buffered.len());
                buffered.drain(..consumed);
                match step {
                    Step::NeedInput => break,
                    Step::Again => {}
                    end => return (out, Some(end)),
                }
            }
            // What waits for more is less than the longest message.
            assert!(buffered.len() < OptionHeader::LEN + MAX_OPTION_LEN as usize);
        }
        (out, None)
    }

    /// Splits replies; all of `out` must be whole replies.
    fn replies(mut out: &[u8]) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        while !out.is_empty() {
            let h = OptionReplyHeader::decode(out.first_chunk().expect("a whole header")).expect("the magic");
            all.push((h.option, h.reply_type));
            out = &out[OptionReplyHeader::LEN..][h.len as usize..];
        }
        all
    }

    #[derive(Debug, Clone)]
    enum Opt {
        Random(u32, Vec<u8>),
        Info(u32, String, Vec<u16>),
        Meta(u32, String, Vec<String>),
        Long(u32, u32),
    }

    fn opt() -> impl Strategy<Value = Opt> {
        let option = prop_oneof![2u32..12, any::<u32>()];
        let name = prop_oneof![Just(String::from("e1")), Just(String::new()), "[a-z]{0,9}"];
        let query = prop_oneof![Just(String::from("base:allocation")), "[a-z:]{0,12}"];
        prop_oneof![
            (option.clone(), proptest::collection::vec(any::<u8>(), 0..40))
                .prop_map(|(o, d)| Opt::Random(o, d)),
            // Not GO: that ends it.
            (name.clone(), proptest::collection::vec(0u16..6, 0..6)).prop_map(|(n, i)| Opt::Info(6, n, i)),
            (9u32..11, name, proptest::collection::vec(query, 0..4)).prop_map(|(o, n, q)| Opt::Meta(o, n, q)),
            (option, MAX_OPTION_LEN + 1..MAX_OPTION_LEN + 1000).prop_map(|(o, l)| Opt::Long(o, l)),
        ]
    }

    fn encode(opts: &[Opt]) -> Vec<u8> {
        let mut all = 3u32.to_be_bytes().to_vec();
        for o in opts {
            let mut data = Vec::new();
            match o {
                Opt::Random(option, d) => put_option(&mut all, *option, d),
                Opt::Info(option, name, infos) => {
                    InfoRequest::put(&mut data, name, infos);
                    put_option(&mut all, *option, &data);
                }
                Opt::Meta(option, name, queries) => {
                    let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
                    MetaContextRequest::put(&mut data, name, &queries);
                    put_option(&mut all, *option, &data);
                }
                Opt::Long(option, len) => put_option(&mut all, *option, &vec![0; *len as usize]),
            }
        }
        all
    }

    fn end_of(step: &Option<Step>) -> String {
        match step {
            None => String::from("open"),
            Some(Step::Enter(n)) => format!("enter {} {:?} {:?}", n.export.name(), n.style, n.contexts),
            Some(Step::Close(reason)) => format!("close {reason}"),
            Some(other) => panic!("{other:?} is no end"),
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_never_grows(input: Vec<u8>, piece in 1usize..50, with_flags: bool) {
            let mut all = if with_flags { 3u32.to_be_bytes().to_vec() } else { Vec::new() };
            all.extend_from_slice(&input);
            let _ = feed(&all, piece, false);
        }

        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(opts in proptest::collection::vec(opt(), 0..8), piece in 1usize..3000) {
            let input = encode(&opts);
            let (whole, end) = feed(&input, usize::MAX, false);
            let (cut, cut_end) = feed(&input, piece, false);
            prop_assert_eq!(&whole, &cut);
            prop_assert_eq!(end_of(&end), end_of(&cut_end));
        }

        #[test]
        fn every_option_has_one_final_reply(opts in proptest::collection::vec(opt(), 0..8), stopping: bool) {
            let (out, end) = feed(&encode(&opts), usize::MAX, stopping);
            let finals = replies(&out)
                .into_iter()
                .filter(|(_, t)| *t == NBD_REP_ACK || t & NBD_REP_FLAG_ERROR != 0)
                .count();
            match end {
                None => prop_assert_eq!(finals, opts.len()),
                Some(_) => prop_assert!(finals <= opts.len()),
            }
        }
    }

    #[test]
    fn a_long_list_comes_in_steps() {
        let table = table(5000);
        let mut hs = Handshake::new();
        let mut out = Vec::new();
        let mut consumed = 0;
        assert!(matches!(hs.advance(&[0, 0, 0, 3], &mut consumed, &table, false, &mut out), Step::Again));
        let list = OptionHeader { option: NBD_OPT_LIST, len: 0 }.encode();
        assert!(matches!(hs.advance(&list, &mut consumed, &table, false, &mut out), Step::Again));
        let mut steps = 0;
        while matches!(hs.advance(&[], &mut consumed, &table, false, &mut out), Step::Again) {
            assert!(out.len() < 2 * LIST_STEP);
            out.clear();
            steps += 1;
        }
        assert!(steps > 2);
    }
}
