//! Constants of the NBD protocol, in the spelling of its document (owner: nbd server helper).
