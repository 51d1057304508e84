//! A process that can be stopped and continued as a whole, as by SIGSTOP and SIGCONT.

use std::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
};

/// One process: the tasks that were spawned in it, and those that they spawn.
#[derive(Debug, Default)]
pub(super) struct Process {
    /// While it is stopped: whom to wake when it goes on.
    stopped: Mutex<Option<Vec<Waker>>>,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Process>>> = const { RefCell::new(None) };
}

impl Process {
    /// Runs `f` as this process: what it spawns belongs to it.
    pub(super) fn enter<T>(self: &Arc<Self>, f: impl FnOnce() -> T) -> T {
        let before = CURRENT.replace(Some(self.clone()));
        let result = f();
        CURRENT.set(before);
        result
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.lock().is_some()
    }

    pub(super) fn stop(&self) {
        self.lock().get_or_insert_default();
    }

    /// Goes on; its tasks run in the order that `shuffle` gives them.
    pub(super) fn go_on(&self, shuffle: impl FnOnce(&mut Vec<Waker>)) {
        let mut waiting = self.lock().take().unwrap_or_default();
        shuffle(&mut waiting);
        waiting.into_iter().for_each(Waker::wake);
    }

    fn holds(&self, waker: &Waker) -> bool {
        match &mut *self.lock() {
            Some(waiting) => {
                if !waiting.iter().any(|w| w.will_wake(waker)) {
                    waiting.push(waker.clone());
                }
                true
            }
            None => false,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Vec<Waker>>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task of the process that spawns it; outside of a simulation it changes nothing.
pub(crate) fn task<F: Future>(inner: F) -> Task<F> {
    Task {
        process: CURRENT.with_borrow(Clone::clone),
        inner: Box::pin(inner),
    }
}

pub(crate) struct Task<F> {
    process: Option<Arc<Process>>,
    inner: Pin<Box<F>>,
}

impl<F: Future> Future for Task<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(process) = self.process.clone() else {
            return self.inner.as_mut().poll(cx);
        };
        if process.holds(cx.waker()) {
            return Poll::Pending;
        }
        process.enter(|| self.inner.as_mut().poll(cx))
    }
}
