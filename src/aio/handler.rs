//! Fd handlers: the table behind mio's tokens.
//!
//! Home thread only. A token names a slot and its generation, so that an event of a removed handler never
//! reaches the handler that got its slot. A handler's callback is taken out of its slot while it runs: it may
//! remove itself, and a nested poll does not enter it a second time but notes what came, to be delivered when
//! the running call has returned (the poller is edge-triggered: the event would not come again).

use std::os::fd::RawFd;

/// What an fd handler wants to hear about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Readable.
    Read,
    /// Writable.
    Write,
    /// Both.
    ReadWrite,
}

impl Interest {
    pub(super) fn to_mio(self) -> mio::Interest {
        match self {
            Interest::Read => mio::Interest::READABLE,
            Interest::Write => mio::Interest::WRITABLE,
            Interest::ReadWrite => mio::Interest::READABLE | mio::Interest::WRITABLE,
        }
    }
}

/// What became ready. Edge-triggered: read or write until `WouldBlock` before waiting again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Reading would not block (data, EOF or error).
    pub readable: bool,
    /// Writing would not block (space or error).
    pub writable: bool,
    /// The peer has closed (fully, or its writing half).
    pub closed: bool,
}

impl Readiness {
    pub(super) fn of(event: &mio::event::Event) -> Readiness {
        let failed = event.is_error();
        Readiness {
            readable: event.is_readable() || event.is_read_closed() || failed,
            writable: event.is_writable() || event.is_write_closed() || failed,
            closed: event.is_read_closed() || failed,
        }
    }

    fn merge(&mut self, other: Readiness) {
        self.readable |= other.readable;
        self.writable |= other.writable;
        self.closed |= other.closed;
    }
}

/// Names a registered fd handler of one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HandlerId(usize);

impl HandlerId {
    pub(super) fn token(self) -> mio::Token {
        mio::Token(self.0)
    }

    pub(super) fn from_token(token: mio::Token) -> HandlerId {
        HandlerId(token.0)
    }
}

/// A handler's callback.
pub(super) type HandlerFn = Box<dyn FnMut(Readiness) + Send>;

const INDEX_BITS: u32 = 32;

struct Slot {
    generation: u32,
    /// None: the slot is free.
    fd: Option<RawFd>,
    /// None while the callback runs.
    callback: Option<HandlerFn>,
    /// What came while the callback ran.
    missed: Option<Readiness>,
}

/// The handlers of one context.
#[derive(Default)]
pub(super) struct HandlerTable {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

impl HandlerTable {
    /// Adds a handler; its id is the token to register with mio.
    pub(super) fn insert(&mut self, fd: RawFd, callback: HandlerFn) -> HandlerId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, fd: None, callback: None, missed: None });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.fd = Some(fd);
        slot.callback = Some(callback);
        HandlerId((slot.generation as usize) << INDEX_BITS | index)
    }

    fn slot(&mut self, id: HandlerId) -> Option<&mut Slot> {
        let index = id.0 & ((1 << INDEX_BITS) - 1);
        let generation = (id.0 >> INDEX_BITS) as u32;
        self.slots.get_mut(index).filter(|s| s.generation == generation && s.fd.is_some())
    }

    /// The descriptor of a handler.
    pub(super) fn fd(&mut self, id: HandlerId) -> Option<RawFd> {
        self.slot(id)?.fd
    }

    /// Removes a handler; returns its fd, to deregister, and the callback, to drop outside.
    pub(super) fn remove(&mut self, id: HandlerId) -> Option<(RawFd, Option<HandlerFn>)> {
        let slot = self.slot(id)?;
        let fd = slot.fd.take()?;
        let callback = slot.callback.take();
        slot.missed = None;
        // One bit less than the index leaves: tokens at the top are the context's own.
        slot.generation = (slot.generation + 1) & 0x7fff_ffff;
        self.free.push(id.0 & ((1 << INDEX_BITS) - 1));
        Some((fd, callback))
    }

    /// Takes the callback of `id` to call it; None if the handler is gone, or is running already, which then
    /// keeps `ready` for later.
    pub(super) fn begin(&mut self, id: HandlerId, ready: Readiness) -> Option<HandlerFn> {
        let slot = self.slot(id)?;
        let callback = slot.callback.take();
        if callback.is_none() {
            slot.missed.get_or_insert_default().merge(ready);
        }
        callback
    }

    /// Puts the callback back after the call, unless the handler was removed meanwhile, which gives it back to be
    /// dropped; and what came while it ran.
    pub(super) fn end(
        &mut self,
        id: HandlerId,
        callback: HandlerFn,
    ) -> (Option<HandlerFn>, Option<Readiness>) {
        match self.slot(id) {
            Some(slot) => {
                slot.callback = Some(callback);
                (None, slot.missed.take())
            }
            None => (Some(callback), None),
        }
    }

    /// Removes every handler.
    pub(super) fn drain(&mut self) -> Vec<(RawFd, Option<HandlerFn>)> {
        self.free.clear();
        self.slots.drain(..).filter_map(|s| Some((s.fd?, s.callback))).collect()
    }

    /// Registered handlers.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
