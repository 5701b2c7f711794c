//! The options of the handshake: what each means and how it is answered. Pure, like `handshake.rs`, which frames them.

use super::export::{Export, ExportTable};
use super::handshake::{CloseReason, Handshake, Step};
use super::meta::{self, MetaSelection};
use super::proto::*;
use super::wire::{
    BlockSizes, InfoRequest, MetaContextRequest, ProtocolError, RepInfo, RepMetaContext, RepServer,
    check_string, put_option_reply,
};
use std::sync::Arc;

/// Finds an export by a name as sent. What is no string of the protocol names nothing.
pub(super) fn find<'t>(table: &'t ExportTable, name: &[u8]) -> Option<&'t Arc<Export>> {
    table.find(check_string("export name", name).ok()?)
}

/// Appends the `NBD_REP_SERVER` of one export.
pub(super) fn put_list_entry(out: &mut Vec<u8>, export: &Export) {
    let mut data = Vec::new();
    RepServer { name: export.name(), description: export.description() }.put(&mut data);
    put_option_reply(out, NBD_OPT_LIST, NBD_REP_SERVER, &data);
}

/// Answers any option but `NBD_OPT_EXPORT_NAME`, `NBD_OPT_STARTTLS` and a well-formed `NBD_OPT_LIST`.
pub(super) fn answer(
    hs: &mut Handshake,
    option: u32,
    data: &[u8],
    table: &ExportTable,
    out: &mut Vec<u8>,
) -> Step {
    let mut reply = |reply_type, data: &[u8]| put_option_reply(out, option, reply_type, data);
    match option {
        NBD_OPT_ABORT => {
            reply(NBD_REP_ACK, b"");
            return Step::Close(CloseReason::Abort);
        }
        NBD_OPT_LIST => reply(NBD_REP_ERR_INVALID, b"this option takes no data"),
        NBD_OPT_STRUCTURED_REPLY | NBD_OPT_EXTENDED_HEADERS if !data.is_empty() => {
            reply(NBD_REP_ERR_INVALID, b"this option takes no data");
        }
        NBD_OPT_STRUCTURED_REPLY if hs.style == HeaderStyle::Extended => {
            reply(NBD_REP_ERR_EXT_HEADER_REQD, b"extended headers were negotiated already");
        }
        NBD_OPT_STRUCTURED_REPLY => {
            hs.style = HeaderStyle::Structured;
            reply(NBD_REP_ACK, b"");
        }
        NBD_OPT_EXTENDED_HEADERS if hs.style == HeaderStyle::Extended => {
            reply(NBD_REP_ERR_INVALID, b"extended headers were negotiated already");
        }
        NBD_OPT_EXTENDED_HEADERS => {
            hs.style = HeaderStyle::Extended;
            reply(NBD_REP_ACK, b"");
        }
        NBD_OPT_INFO | NBD_OPT_GO => return info(hs, option, data, table, out),
        NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT => meta_context(hs, option, data, table, out),
        _ => reply(NBD_REP_ERR_UNSUP, b"unknown option"),
    }
    Step::Again
}

fn put_protocol_error(out: &mut Vec<u8>, option: u32, e: ProtocolError) {
    let reply_type = match e {
        ProtocolError::TooManyQueries(_) => NBD_REP_ERR_TOO_BIG,
        _ => NBD_REP_ERR_INVALID,
    };
    put_option_reply(out, option, reply_type, e.to_string().as_bytes());
}

fn info(hs: &mut Handshake, option: u32, data: &[u8], table: &ExportTable, out: &mut Vec<u8>) -> Step {
    let request = match InfoRequest::decode(data) {
        Ok(request) => request,
        Err(e) => {
            put_protocol_error(out, option, e);
            return Step::Again;
        }
    };
    let export = match hs.find(table, request.name) {
        Ok(export) => export,
        Err((reply_type, why)) => {
            put_option_reply(out, option, reply_type, why.as_bytes());
            return Step::Again;
        }
    };
    let admission = match option {
        NBD_OPT_GO => export.admit(),
        _ => None,
    };
    if option == NBD_OPT_GO && admission.is_none() {
        put_option_reply(
            out,
            option,
            NBD_REP_ERR_POLICY,
            b"the export has as many connections as it may have; try again later",
        );
        return Step::Again;
    }
    let mut flags = hs.flags_of(export);
    if option == NBD_OPT_INFO && hs.style == HeaderStyle::Extended {
        // Of use once contexts are selected, which may still come; NBD_OPT_GO then says what holds.
        flags |= TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD;
    }
    let sizes = export.block_sizes();
    let asked = request.wants(NBD_INFO_BLOCK_SIZE);
    let ask_first = option == NBD_OPT_INFO && export.sizes_unasked() && !asked && sizes.min > 1;
    let mut data = Vec::new();
    let mut put = |info: RepInfo<'_>| {
        data.clear();
        info.put(&mut data);
        put_option_reply(out, option, NBD_REP_INFO, &data);
    };
    put(RepInfo::Export { size: export.size(), flags });
    if request.wants(NBD_INFO_NAME) {
        put(RepInfo::Name(export.name()));
    }
    if request.wants(NBD_INFO_DESCRIPTION) && !export.description().is_empty() {
        put(RepInfo::Description(export.description()));
    }
    if asked {
        put(RepInfo::BlockSize(sizes));
    } else if export.sizes_unasked() {
        // Unaligned requests work all the same.
        put(RepInfo::BlockSize(if ask_first { sizes } else { BlockSizes { min: 1, ..sizes } }));
    }
    if ask_first {
        let why = b"ask for NBD_INFO_BLOCK_SIZE: the smallest block of this export is not 1 byte";
        put_option_reply(out, option, NBD_REP_ERR_BLOCK_SIZE_REQD, why);
        return Step::Again;
    }
    put_option_reply(out, option, NBD_REP_ACK, b"");
    match admission {
        Some(admission) => Step::Enter(Box::new(hs.enter(export, admission))),
        None => Step::Again,
    }
}

fn meta_context(hs: &mut Handshake, option: u32, data: &[u8], table: &ExportTable, out: &mut Vec<u8>) {
    let set = option == NBD_OPT_SET_META_CONTEXT;
    if set {
        // A new selection replaces the old one, also when it fails.
        hs.meta = MetaSelection::default();
    }
    if hs.style == HeaderStyle::Simple {
        put_option_reply(out, option, NBD_REP_ERR_INVALID, b"structured replies must be negotiated first");
        return;
    }
    let request = match MetaContextRequest::decode(data) {
        Ok(request) => request,
        Err(e) => return put_protocol_error(out, option, e),
    };
    let export = match hs.find(table, request.name) {
        Ok(export) => export,
        Err((reply_type, why)) => return put_option_reply(out, option, reply_type, why.as_bytes()),
    };
    let mut data = Vec::new();
    let mut put = |id: u32, name: &str| {
        data.clear();
        RepMetaContext { id, name }.put(&mut data);
        put_option_reply(out, option, NBD_REP_META_CONTEXT, &data);
    };
    if set {
        let selection = MetaSelection::select(export, request.queries());
        for context in selection.contexts() {
            put(context.id, context.kind.name());
        }
        hs.meta = selection;
    } else {
        // `queries()` is not Clone: collecting borrows only the slices, bounded by MAX_META_QUERIES.
        let queries: Vec<&[u8]> = request.queries().collect();
        for kind in meta::list(export, queries.iter().copied()) {
            put(0, kind.name());
        }
    }
    put_option_reply(out, option, NBD_REP_ACK, b"");
}
