//! Databases and configuration of one demo, all new.

use std::{
    fs,
    path::{Path, PathBuf},
};

use sqlx::{Connection as _, PgConnection, SqliteConnection};
use tempfile::TempDir;
use toml::{Table, Value};

use crate::{PRODUCTS, Result, say};

/// Where one demo plays.
pub(crate) struct Stage {
    folder: TempDir,
    inventory: String,
    orders: String,
    keep: bool,
}

impl Stage {
    /// Copies the configuration, with free ports, and with new SQLite files where it names SQLite files.
    pub(crate) fn set(config: &Path, keep: bool) -> Result<Self> {
        let text = fs::read_to_string(config).map_err(|e| format!("{}: {e}", config.display()))?;
        let mut table: Table = text
            .parse()
            .map_err(|e| format!("{}: {e}", config.display()))?;
        let folder = TempDir::with_prefix("pillarbox-demo-")?;
        let inventory = service(&mut table, "inventory", folder.path())?;
        let orders = service(&mut table, "orders", folder.path())?;
        let stage = Self {
            folder,
            inventory,
            orders,
            keep,
        };
        fs::write(stage.config(), table.to_string())?;
        fs::write(stage.products(), PRODUCTS)?;
        Ok(stage)
    }

    pub(crate) fn inventory(&self) -> &str {
        &self.inventory
    }

    pub(crate) fn orders(&self) -> &str {
        &self.orders
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path().join("shop.toml")
    }

    pub(crate) fn products(&self) -> PathBuf {
        self.folder.path().join("products.csv")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.folder.path().join("shop.log")
    }

    /// Sets the relays' cursors to the beginning, so that every event is sent again. Answers how many there are.
    pub(crate) async fn set_back(&self) -> Result<i64> {
        Ok(set_back(&self.inventory).await? + set_back(&self.orders).await?)
    }

    /// Cleans up, unless somebody wants to look.
    pub(crate) fn end(mut self) {
        if self.keep {
            self.folder.disable_cleanup(true);
            say(format_args!("\nkept: {}", self.folder.path().display()));
        }
    }
}

/// Fills in one service's section; answers its database's address.
fn service(config: &mut Table, name: &str, folder: &Path) -> Result<String> {
    let section = table(config, name)?;
    table(section, "http")?.insert("listen".to_owned(), "127.0.0.1:0".into());
    let variable = format!("PILLARBOX_{}__STORE__URL", name.to_uppercase());
    if let Ok(url) = std::env::var(&variable) {
        return Ok(url);
    }
    let store = table(section, "store")?;
    let is_sqlite = store
        .get("url")
        .and_then(Value::as_str)
        .is_some_and(|url| url.starts_with("sqlite:"));
    if !is_sqlite {
        return Err(format!(
            "the demo needs databases of its own: run it with `make demo CONFIG=…`, which starts servers, or name an \
             empty database in {variable}"
        )
        .into());
    }
    let url = format!("sqlite://{}", folder.join(format!("{name}.db")).display());
    store.insert("url".to_owned(), url.clone().into());
    Ok(url)
}

fn table<'a>(of: &'a mut Table, name: &str) -> Result<&'a mut Table> {
    let entry = of.entry(name).or_insert_with(|| Table::new().into());
    let found = entry.as_table_mut();
    found.ok_or_else(|| format!("{name}: a table is expected").into())
}

async fn set_back(url: &str) -> Result<i64> {
    if url.starts_with("sqlite:") {
        let mut database = SqliteConnection::connect(url).await?;
        sqlx::query("UPDATE pillarbox_cursor SET last = 0")
            .execute(&mut database)
            .await?;
        let count = "SELECT count(*) FROM pillarbox_outbox";
        return Ok(sqlx::query_scalar(count).fetch_one(&mut database).await?);
    }
    let mut database = PgConnection::connect(url).await?;
    let back = "UPDATE pillarbox.cursor SET seen = '1:1:', base = 0, upto = NULL, last = 0";
    sqlx::query(back).execute(&mut database).await?;
    let count = "SELECT count(*) FROM pillarbox.outbox";
    Ok(sqlx::query_scalar(count).fetch_one(&mut database).await?)
}
