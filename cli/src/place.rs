use std::{
    io::{BufRead as _, IsTerminal as _, Write as _, stderr, stdin},
    path::PathBuf,
    time::SystemTime,
};

use clap::Args;
use humantime_serde::re::humantime;
use pillarbox::{Admin, Config, Database, Settings};

use crate::{
    answer::Answer,
    failure::{Failure, Result},
};

/// Which configuration a command works with, and how it answers.
#[derive(Args)]
pub(crate) struct Place {
    /// The configuration, in TOML; environment variables such as PILLARBOX_STORE__URL override it
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The section of one service in it: `orders` lays [orders.store] and the like over the common tables
    #[arg(long, value_name = "TABLE")]
    at: Option<String>,
    /// Answer in JSON, whose shape stays; errors too
    #[arg(long)]
    pub(crate) json: bool,
}

impl Place {
    pub(crate) fn settings(&self) -> Result<Settings> {
        let config = Config::load(&self.config)?;
        Ok(match &self.at {
            Some(section) => config.at(section)?,
            None => config.settings()?,
        })
    }

    /// The database, tried once.
    pub(crate) async fn database(&self) -> Result<Database> {
        Ok(self.settings()?.store.open().await?)
    }

    pub(crate) async fn admin(&self, operator: &str) -> Result<Admin> {
        Ok(Admin::new(&self.database().await?, operator))
    }

    pub(crate) fn answer(&self) -> Answer {
        Answer::new(self.json)
    }
}

/// Who does it, and why: both go into the log.
#[derive(Args)]
pub(crate) struct By {
    /// Who does this, for the log [default: the user's name]
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    /// Why, for the log
    #[arg(long, value_name = "TEXT", default_value = "no reason was given")]
    pub(crate) why: String,
}

impl By {
    pub(crate) fn operator(&self) -> String {
        let variable = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        let named = self.operator.clone();
        named
            .or_else(|| variable("USER"))
            .or_else(|| variable("LOGNAME"))
            .unwrap_or_else(|| "pillarbox".to_owned())
    }
}

/// A name that this database does not know.
pub(crate) fn unknown<'n>(what: &str, name: &str, known: impl Iterator<Item = &'n str>) -> Failure {
    let known: Vec<&str> = known.collect();
    let expected = match known.as_slice() {
        [] => format!("this database knows no {what} yet"),
        known => format!("this database knows: {}", known.join(", ")),
    };
    Failure::Usage(format!("there is no {what} {name:?}; {expected}"))
}

/// A point of time, or how long ago it was.
pub(crate) fn time(text: &str) -> Result<SystemTime, String> {
    if let Ok(ago) = humantime::parse_duration(text) {
        let then = SystemTime::now().checked_sub(ago);
        return then.ok_or_else(|| "that is before all times".to_owned());
    }
    humantime::parse_rfc3339_weak(text).map_err(|_| {
        "expected a time in UTC, as in 2026-11-24T12:00:00Z, or how long ago, as in 90m".to_owned()
    })
}

/// Asks at the terminal. Without one, nobody can answer.
pub(crate) fn confirm(what: &str) -> Result<()> {
    if !stdin().is_terminal() {
        let text = format!("{what}; without a terminal to ask at, say --yes");
        return Err(Failure::Usage(text));
    }
    write!(stderr(), "{what}. Go on? [y/N] ")?;
    stderr().flush()?;
    let mut answer = String::new();
    stdin().lock().read_line(&mut answer)?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::Finding("nothing was changed".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_time_is_a_point_or_an_age() {
        let at = |seconds| Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(time("1970-01-02T00:00:00Z"), at(86_400));
        assert_eq!(time("1970-01-02 00:00:01"), at(86_401));
        let then = time("1h").expect("an age");
        let ago = SystemTime::now().duration_since(then);
        assert!(ago.expect("the past") >= Duration::from_secs(3_600));
        for wrong in [
            "",
            "yesterday",
            "1970-13-01T00:00:00Z",
            "-1h",
            "9999999999999999y",
        ] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
