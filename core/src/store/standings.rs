//! What a status is made of, as a store finds it.

use std::time::SystemTime;

use crate::{
    admin::{
        DestinationStatus, DutyStatus, Exceptions, GroupStatus, PartitionStatus, SourceStatus,
    },
    failure::Side,
};

/// Leases and cursors as a database shows them.
#[derive(Debug, Clone)]
pub struct Standings {
    /// When, by the database's clock.
    pub at: SystemTime,
    /// By name.
    pub destinations: Vec<DestinationStatus>,
    /// By name.
    pub groups: Vec<GroupStatus>,
    /// By kind, scope and shard.
    pub duties: Vec<DutyStatus>,
    /// Where something may wait or be given up: also what has no cursor any more.
    pub scopes: Vec<(Side, String)>,
}

impl Standings {
    pub(crate) fn new(at: SystemTime) -> Self {
        Self {
            at,
            destinations: Vec::new(),
            groups: Vec::new(),
            duties: Vec::new(),
            scopes: Vec::new(),
        }
    }

    pub(crate) fn partition(&mut self, destination: &str, partition: PartitionStatus) {
        self.destination(destination).partitions.push(partition);
    }

    pub(crate) fn source(&mut self, group: &str, source: SourceStatus) {
        self.group(group).sources.push(source);
    }

    pub(crate) fn scope(&mut self, side: Side, scope: &str) {
        let known = self
            .scopes
            .iter()
            .any(|(s, name)| *s == side && name == scope);
        if !known {
            self.scopes.push((side, scope.to_owned()));
        }
    }

    pub(crate) fn put(&mut self, (side, scope): (Side, String), exceptions: Exceptions) {
        match side {
            Side::Relay => self.destination(&scope).exceptions = exceptions,
            Side::Consumer => self.group(&scope).exceptions = exceptions,
        }
    }

    fn destination(&mut self, name: &str) -> &mut DestinationStatus {
        let at = self
            .destinations
            .partition_point(|d| d.name.as_str() < name);
        if self.destinations.get(at).is_none_or(|d| d.name != name) {
            let new = DestinationStatus {
                name: name.to_owned(),
                partitions: Vec::new(),
                exceptions: Exceptions::default(),
            };
            self.destinations.insert(at, new);
            self.scope(Side::Relay, name);
        }
        &mut self.destinations[at]
    }

    fn group(&mut self, name: &str) -> &mut GroupStatus {
        let at = self.groups.partition_point(|g| g.name.as_str() < name);
        if self.groups.get(at).is_none_or(|g| g.name != name) {
            let new = GroupStatus {
                name: name.to_owned(),
                sources: Vec::new(),
                exceptions: Exceptions::default(),
            };
            self.groups.insert(at, new);
            self.scope(Side::Consumer, name);
        }
        &mut self.groups[at]
    }
}
