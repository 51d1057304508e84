//! A value that many tasks watch.
//!
//! Each watcher has a channel of its own, and they wake in the order in which they came. The receivers of one `watch` channel
//! wake in a random order, and no seed of the simulation would rerun the same.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

#[derive(Debug)]
pub(crate) struct Signal<T>(Mutex<Inner<T>>);

#[derive(Debug)]
struct Inner<T> {
    value: T,
    watchers: Vec<watch::Sender<T>>,
}

impl<T: Clone> Signal<T> {
    pub(crate) fn new(value: T) -> Self {
        let watchers = Vec::new();
        Self(Mutex::new(Inner { value, watchers }))
    }

    pub(crate) fn get(&self) -> T {
        self.lock().value.clone()
    }

    /// Its receiver has seen what there is now.
    pub(crate) fn watch(&self) -> watch::Receiver<T> {
        let mut inner = self.lock();
        let (watcher, receiver) = watch::channel(inner.value.clone());
        inner.watchers.retain(|watcher| !watcher.is_closed());
        inner.watchers.push(watcher);
        receiver
    }

    pub(crate) fn set(&self, value: T) {
        let mut inner = self.lock();
        inner.value = value.clone();
        for watcher in &inner.watchers {
            watcher.send_replace(value.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_who_watch_see_the_change() {
        let signal = Signal::new(1);
        let (mut one, gone) = (signal.watch(), signal.watch());
        drop(gone);
        signal.set(2);
        let mut late = signal.watch();
        assert!(one.changed().await.is_ok());
        assert_eq!((*one.borrow(), signal.get()), (2, 2));
        assert!(!late.has_changed().unwrap());
        signal.set(3);
        assert!(late.changed().await.is_ok());
        drop(signal);
        assert!(late.changed().await.is_err());
    }
}
