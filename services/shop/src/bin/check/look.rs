//! The statements, and what comes back from them.

use std::{collections::HashMap, path::Path, time::Duration};

use sqlx::{
    PgPool, Row as _, SqlitePool,
    postgres::PgRow,
    sqlite::{SqliteConnectOptions, SqliteRow},
};

use crate::{Product, Result};

/// A database of either kind.
pub(crate) enum Database {
    Postgres(PgPool),
    Sqlite(SqlitePool),
}

/// A statement in both dialects; every column is cast to text.
pub(crate) struct Sql {
    postgres: &'static str,
    sqlite: &'static str,
}

impl Sql {
    const fn both(sql: &'static str) -> Self {
        Self {
            postgres: sql,
            sqlite: sql,
        }
    }
}

impl Database {
    pub(crate) async fn open(url: &str) -> Result<Self> {
        if url.starts_with("sqlite:") {
            let options: SqliteConnectOptions = url.parse()?;
            let options = options.busy_timeout(Duration::from_secs(20));
            return Ok(Self::Sqlite(SqlitePool::connect_with(options).await?));
        }
        Ok(Self::Postgres(PgPool::connect(url).await?))
    }

    pub(crate) async fn rows(&self, sql: &Sql) -> Result<Vec<Vec<String>>> {
        match self {
            Self::Postgres(pool) => {
                let rows = sqlx::query(sql.postgres).fetch_all(pool).await?;
                let texts = |row: &PgRow| (0..row.len()).map(|i| row.try_get(i)).collect();
                Ok(rows.iter().map(texts).collect::<sqlx::Result<_>>()?)
            }
            Self::Sqlite(pool) => {
                let rows = sqlx::query(sql.sqlite).fetch_all(pool).await?;
                let texts = |row: &SqliteRow| (0..row.len()).map(|i| row.try_get(i)).collect();
                Ok(rows.iter().map(texts).collect::<sqlx::Result<_>>()?)
            }
        }
    }
}

/// id, type, microseconds since 1970
pub(crate) const LOG: Sql = Sql {
    postgres: "SELECT id::text, type, (extract(epoch FROM created_at) * 1000000)::bigint::text FROM pillarbox.outbox",
    sqlite: "SELECT id, type, CAST(created_at AS TEXT) FROM pillarbox_outbox",
};
pub(crate) const PUBLISHED: Sql = Sql {
    postgres: "SELECT count(*)::text FROM pillarbox.outbox o JOIN pillarbox.cursor c USING (partition) \
               WHERE c.destination = 'main' AND (pg_visible_in_snapshot(o.xact_id, c.seen) OR \
               (c.upto IS NOT NULL AND o.position <= c.last AND pg_visible_in_snapshot(o.xact_id, c.upto)))",
    sqlite: "SELECT CAST(count(*) AS TEXT) FROM pillarbox_outbox o JOIN pillarbox_cursor c \
             ON c.destination = 'main' AND o.position <= c.last",
};
pub(crate) const WAITING: Sql = Sql {
    postgres: "SELECT count(*)::text FROM pillarbox.deferred",
    sqlite: "SELECT CAST(count(*) AS TEXT) FROM pillarbox_deferred",
};
pub(crate) const DEAD: Sql = Sql {
    postgres: "SELECT count(*)::text FROM pillarbox.dead_letter",
    sqlite: "SELECT CAST(count(*) AS TEXT) FROM pillarbox_dead_letter",
};
pub(crate) const EFFECTS_OF_ORDERS: Sql = Sql {
    postgres: "SELECT event_id, (extract(epoch FROM at) * 1000000)::bigint::text \
               FROM orders_history WHERE event_id IS NOT NULL",
    sqlite: "SELECT event_id, CAST(CAST(round((julianday(at) - 2440587.5) * 86400000.0) AS INTEGER) * 1000 AS TEXT) \
             FROM orders_history WHERE event_id IS NOT NULL",
};
pub(crate) const EFFECTS_OF_INVENTORY: Sql = Sql {
    postgres: "SELECT event_id, (extract(epoch FROM applied_at) * 1000000)::bigint::text FROM inventory_effect",
    sqlite: "SELECT event_id, CAST(CAST(round((julianday(applied_at) - 2440587.5) * 86400000.0) AS INTEGER) * 1000 \
             AS TEXT) FROM inventory_effect",
};
/// id, initial, restocked, quantity, held, held by reservations, sold
pub(crate) const STOCK: Sql = Sql::both(
    "SELECT p.id, CAST(initial AS TEXT), \
     CAST((SELECT coalesce(sum(r.quantity), 0) FROM inventory_restock r WHERE r.product_id = p.id) AS TEXT), \
     CAST(quantity AS TEXT), CAST(held AS TEXT), \
     CAST((SELECT coalesce(sum(r.quantity), 0) FROM inventory_reservation r \
           WHERE r.product_id = p.id AND r.state = 'held') AS TEXT), \
     CAST((SELECT coalesce(sum(r.quantity), 0) FROM inventory_reservation r \
           WHERE r.product_id = p.id AND r.state = 'confirmed') AS TEXT) \
     FROM inventory_product p",
);
pub(crate) const RESERVATIONS: Sql =
    Sql::both("SELECT CAST(order_id AS TEXT), state FROM inventory_reservation");
pub(crate) const RESTOCKS: Sql = Sql::both("SELECT CAST(count(*) AS TEXT) FROM inventory_restock");
pub(crate) const ORDERS: Sql = Sql::both("SELECT CAST(id AS TEXT), status FROM orders_order");

/// The types of inventory events; orders handles all of them.
pub(crate) const INVENTORY_TYPES: [&str; 6] = [
    "inventory.stock.reserved",
    "inventory.stock.confirmed",
    "inventory.stock.released",
    "inventory.stock.failed",
    "inventory.stock.depleted",
    "inventory.stock.replenished",
];
/// The types of orders events that inventory handles.
pub(crate) const ORDERS_TYPES: [&str; 2] = ["orders.order.cancelled", "orders.order.failed"];

pub(crate) async fn count(database: &Database, sql: &Sql) -> Result<usize> {
    let rows = database.rows(sql).await?;
    let number = rows
        .first()
        .and_then(|row| row.first())
        .ok_or("a number expected")?;
    Ok(number.parse()?)
}

pub(crate) fn pair(row: Vec<String>) -> Result<(String, String)> {
    let [a, b] = <[String; 2]>::try_from(row).map_err(|_| "two columns expected")?;
    Ok((a, b))
}

pub(crate) fn products(rows: Vec<Vec<String>>) -> Result<Vec<Product>> {
    rows.into_iter()
        .map(|row| {
            let [id, numbers @ ..] =
                <[String; 7]>::try_from(row).map_err(|_| "seven columns expected")?;
            let numbers = numbers
                .iter()
                .map(|n| n.parse())
                .collect::<std::result::Result<Vec<i64>, _>>()?;
            let [initial, restocked, quantity, held, reserved, sold] =
                <[i64; 6]>::try_from(numbers).map_err(|_| "six numbers expected")?;
            Ok(Product {
                id,
                initial,
                restocked,
                quantity,
                held,
                reserved,
                sold,
            })
        })
        .collect()
}

pub(crate) fn expected(file: &Path) -> Result<HashMap<String, i64>> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    text.lines()
        .skip(1)
        .map(|line| {
            let mut cells = line.split(',');
            let (id, quantity) = (cells.next(), cells.next());
            let (id, quantity) = id.zip(quantity).ok_or("product_id,quantity expected")?;
            Ok((id.to_owned(), quantity.parse()?))
        })
        .collect()
}
