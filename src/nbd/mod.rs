//! The NBD protocol: server and client. (owner: nbd helpers)

pub mod proto;
