//! Running a coroutine to its end from plain code that has no event loop: tools, and opening images before serving.

use super::Coroutine;
use crate::aio::{AioConfig, AioContext};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Runs `f` in a coroutine until it is done, on the calling thread's AioContext, or on one made for it. Blocks; not for
/// coroutines.
///
/// # Errors
/// When there can be no event loop.
///
/// # Panics
/// When `f` does.
pub fn run_to_end<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let context = match AioContext::current() {
        Some(context) => context,
        None => AioContext::new(AioConfig { name: "main".to_owned(), ..AioConfig::default() })?,
    };
    let result = Arc::new(Mutex::new(None));
    let slot = Arc::clone(&result);
    let take = move |slot: &Mutex<Option<T>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let coroutine = Coroutine::new(move || {
        let value = f();
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    });
    coroutine.schedule(&context);
    let mut value = None;
    context.poll_until(|| {
        // A panic ends it without a value.
        let ended = coroutine.outcome().is_some();
        value = take(&result);
        value.is_some() || ended
    });
    Ok(value.expect("the coroutine panicked"))
}
