//! The session's log: reading ahead, moving the cursor.

use std::sync::Arc;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::{Done, READING, SETTLING, Session};
use crate::{
    cursor::Progress,
    error::Result,
    event::Key,
    failure::UNREADABLE,
    store::{Logged, Slice},
};

impl Session<'_> {
    pub(super) fn read(&mut self) {
        self.reading = true;
        let (store, lease, from) = (self.store.clone(), self.lease.clone(), self.from.clone());
        let partition = self.partition;
        let room = u32::try_from(self.window.room()).unwrap_or(u32::MAX);
        let limit = room.min(self.core.settings.batch);
        let read = async move {
            let slice = store.read(partition, &from, limit).await?;
            // What a crash of the database could still undo is not shown to anybody.
            if let Some(gate) = &slice.gate {
                store.flush(&lease, gate).await?;
            }
            Ok(slice)
        };
        self.work.push(read.map(Done::Read).boxed());
    }

    /// Not for every place that falls free: a read has a price.
    pub(super) fn wants_more(&self) -> bool {
        if !self.core.reads_on(&self.from) {
            return false;
        }
        let limits = self.core.settings.window;
        let batch = usize::try_from(self.core.settings.batch).unwrap_or(usize::MAX);
        let worthwhile = batch.min(limits.unsettled).min(limits.held) / 4;
        self.window.room() >= worthwhile.max(1)
    }

    pub(super) fn read_done(&mut self, read: Result<Slice>) -> Result<()> {
        self.reading = false;
        let now = Instant::now();
        let slice = match read {
            Ok(slice) => self.core.bounded(&self.from, slice),
            Err(e) => {
                self.poll_at = now + self.read_backoff.step();
                return self.trouble(READING, e);
            }
        };
        self.read_backoff.reset();
        self.goes_on(READING);
        self.from = match (&slice.end, slice.events.last()) {
            (Some(end), _) => end.clone(),
            (None, Some(last)) => slice.within.at(last.position),
            (None, None) => self.from.clone(),
        };
        let nothing_unsettled = self.window.is_empty();
        if let Some(progress) = self
            .trail
            .note(self.window.next_seq(), &slice, nothing_unsettled)
        {
            self.unsettled = Some(progress);
        }
        if slice.events.is_empty() {
            if !self.core.wake.is_busy() {
                self.poll = (self.poll * 2).min(self.core.settings.idle_poll);
            }
            self.poll_at = now + self.poll;
        } else {
            (self.poll_at, self.poll) = (now, self.core.settings.busy_poll);
        }
        for event in slice.events {
            self.newest = self.newest.max(event.position);
            self.push(event);
        }
        Ok(())
    }

    pub(super) fn push(&mut self, mut event: Logged) {
        if !self.core.wants(&event, self.since) {
            self.window.push_settled();
            return;
        }
        // Nobody shares it yet: changed in place.
        let message = Arc::make_mut(&mut event.message);
        self.core.mark(message);
        let attributes = &mut message.attributes;
        if let Some(source) = &self.core.source {
            attributes
                .entry("source".to_owned())
                .or_insert_with(|| source.to_string());
        }
        // A plain INSERT did not pass through enqueue's checks. Our own attributes are not held against it.
        let unread = event.defect.take();
        if unread.is_some() {
            attributes.insert(UNREADABLE.to_owned(), "true".to_owned());
        }
        let checked = || self.core.limits.check(message).err();
        let refused = unread.or_else(|| checked().map(|e| e.to_string()));
        let attributes = &mut message.attributes;
        attributes.insert("pillarboxposition".to_owned(), event.position.to_string());
        attributes.insert("pillarboxepoch".to_owned(), self.lease.epoch.to_string());
        // What is never sent needs no order, and must not slip through a line.
        let key = if refused.is_none() {
            Key::of(&event.message)
        } else {
            None
        };
        let size = event.message.size();
        event.defect = refused;
        // Also when its time has come already: where events fall due, it is seen whether they were cancelled.
        if event.deliver_at.is_some() && event.defect.is_none() {
            self.window.push_deferring(event, size);
            return;
        }
        self.window.push(event, key, size);
    }

    pub(super) fn advance(&mut self) {
        let Some(last) = self.window.advance() else {
            return;
        };
        if let Some(progress) = self.trail.settled(last) {
            self.unsettled = Some(progress);
        }
        self.unsure.retain(|seq| *seq > last);
    }

    pub(super) fn settle(&mut self, now: Instant) {
        let Some(progress) = self.unsettled.take() else {
            return;
        };
        self.settling = true;
        self.settle_at = now + self.core.settings.settle;
        let (store, lease, term) = (
            self.store.clone(),
            self.lease.clone(),
            self.core.settings.lease,
        );
        let settle = async move {
            let result = store.settle(&lease, &progress, term, false).await;
            Done::Settled(progress, now, result)
        };
        self.work.push(settle.boxed());
    }

    pub(super) fn settled(
        &mut self,
        progress: Progress,
        sent: Instant,
        result: Result<()>,
    ) -> Result<()> {
        self.settling = false;
        match result {
            Ok(()) => {
                self.keeper.renewed(sent);
                self.goes_on(SETTLING);
                Ok(())
            }
            Err(e) => {
                // A newer one may be waiting already.
                self.unsettled.get_or_insert(progress);
                self.trouble(SETTLING, e)
            }
        }
    }
}
