use std::{
    fmt::Write as _,
    io::{self, Write},
    time::{Duration, SystemTime},
};

use humantime_serde::re::humantime;
use serde::Serialize;

use crate::failure::Result;

/// Where a command's answer goes: stdout, for a person or a machine.
#[derive(Clone, Copy)]
pub(crate) struct Answer {
    json: bool,
}

impl Answer {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Gives it whole: the value as JSON, or the text.
    pub(crate) fn give(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
        let mut whole = if self.json {
            serde_json::to_string_pretty(value)?
        } else {
            text()
        };
        if !whole.ends_with('\n') {
            whole.push('\n');
        }
        write(&whole)
    }

    /// One line of JSON of an answer that has many.
    pub(crate) fn line(value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(value)?;
        line.push('\n');
        write(&line)
    }
}

/// Writes to stdout at once, so that a reader who goes away is noticed.
pub(crate) fn write(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Columns under their heads, as wide as they must be.
pub(crate) fn table(indent: usize, heads: &[&str], rows: &[Vec<String>]) -> String {
    let width = |i: usize| {
        let cells = rows.iter().filter_map(|row| row.get(i));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(heads.get(i).map_or(0, |h| h.chars().count()))
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = " ".repeat(indent);
        for (cell, width) in cells.zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    line(&mut heads.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// Others' texts as a terminal may get them: on one line, without control characters, not endless.
pub(crate) fn plain(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for (n, c) in text.chars().enumerate() {
        if n == most {
            shown.push('…');
            break;
        }
        match c {
            c if c.is_control() => shown.extend(c.escape_default()),
            // Marks that turn the direction of writing, or that nobody sees.
            '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}'
            | '\u{feff}' => {
                shown.extend(c.escape_unicode());
            }
            c => shown.push(c),
        }
    }
    shown
}

/// A time as RFC 3339 in UTC, whole microseconds.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    // humantime's end is the year 9999; what lies outside of it was no time of ours.
    let bound = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799);
    let time = time.clamp(SystemTime::UNIX_EPOCH, bound);
    humantime::format_rfc3339_micros(time).to_string()
}

/// A duration for people: to the second above one, to the millisecond below.
pub(crate) fn lasting(d: Duration) -> String {
    let rounded = if d >= Duration::from_secs(1) {
        Duration::from_secs(d.as_secs())
    } else {
        Duration::from_millis(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    };
    humantime::format_duration(rounded).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = vec![
            vec!["a".into(), "bcd".into()],
            vec!["efghi".into(), String::new()],
        ];
        let shown = table(2, &["one", "two"], &rows);
        assert_eq!(shown, "  one    two\n  a      bcd\n  efghi\n");
    }

    #[test]
    fn a_terminal_gets_no_commands_of_others() {
        assert_eq!(
            plain("a\x1b[2Jb\nc\u{202e}d", 99),
            "a\\u{1b}[2Jb\\nc\\u{202e}d"
        );
        assert_eq!(plain("abcdef", 3), "abc…");
        assert_eq!(plain("abc", 3), "abc");
    }

    #[test]
    fn every_time_can_be_shown() {
        assert_eq!(
            rfc3339(SystemTime::UNIX_EPOCH),
            "1970-01-01T00:00:00.000000Z"
        );
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(rfc3339(far), "9999-12-31T23:59:59.000000Z");
        assert_eq!(lasting(Duration::from_micros(61_500_000)), "1m 1s");
        assert_eq!(lasting(Duration::from_micros(1_500)), "1ms");
    }
}
