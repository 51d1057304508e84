use std::path::PathBuf;

use clap::Args;
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
