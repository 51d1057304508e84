//! Progress is a position that moves, never a status column.

/// How far one relay partition of a destination has come. Opaque to the relay but for [`Progress::at`].
///
/// PostgreSQL reads the log in slices between two snapshots, `seen` (everything visible in it is settled) and `upto`;
/// inside the open slice, `last` is settled. SQLite, whose writers are serial, uses `last` alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// A snapshot: everything visible in it is settled.
    pub seen: String,
    /// The highest position that is visible in `seen`; may be too low, never too high.
    pub base: i64,
    /// The end of the open slice, none between slices.
    pub upto: Option<String>,
    /// The highest settled position inside the open slice.
    pub last: i64,
}

impl Progress {
    /// The same slice, settled up to a position in it.
    #[must_use]
    pub fn at(&self, position: i64) -> Self {
        Self {
            last: position,
            ..self.clone()
        }
    }
}
