use async_trait::async_trait;
use pillarbox_contracts::{
    ProductId,
    http::{HistoryEntry, Procurement},
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{History, Order, PROCUREMENTS, Repository, product_id, quantity, status};

#[async_trait]
impl Repository for PgConnection {
    async fn add_order(&mut self, order: &Order) -> sqlx::Result<()> {
        let sql = "INSERT INTO orders_order \
                   (id, user_id, product_id, quantity, status, created_at, changed_at) \
                   VALUES ($1, $2, $3, $4, $5, $6, $6)";
        let query = sqlx::query(sql)
            .bind(order.id)
            .bind(order.user_id)
            .bind(order.product_id.as_str())
            .bind(i64::from(order.quantity))
            .bind(order.status.as_str())
            .bind(order.created_at);
        query.execute(self).await?;
        Ok(())
    }

    async fn order(&mut self, id: Uuid) -> sqlx::Result<Option<Order>> {
        let sql = "SELECT * FROM orders_order WHERE id = $1";
        let row = sqlx::query(sql).bind(id).fetch_optional(self).await?;
        row.as_ref().map(order).transpose()
    }

    async fn lock_order(&mut self, id: Uuid) -> sqlx::Result<Option<Order>> {
        let sql = "SELECT * FROM orders_order WHERE id = $1 FOR UPDATE";
        let row = sqlx::query(sql).bind(id).fetch_optional(self).await?;
        row.as_ref().map(order).transpose()
    }

    async fn move_order(
        &mut self,
        was: &Order,
        now: &Order,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool> {
        let sql = "UPDATE orders_order SET status = $1, reason = $2, reservation_id = $3, changed_at = $4 \
                   WHERE id = $5 AND status = $6";
        let query = sqlx::query(sql)
            .bind(now.status.as_str())
            .bind(now.reason.as_deref())
            .bind(now.reservation_id)
            .bind(at)
            .bind(was.id)
            .bind(was.status.as_str());
        Ok(query.execute(self).await?.rows_affected() == 1)
    }

    async fn add_history(&mut self, line: &History<'_>) -> sqlx::Result<()> {
        let sql = "INSERT INTO orders_history \
                   (order_id, product_id, event_id, event_type, what, at) VALUES ($1, $2, $3, $4, $5, $6)";
        let query = sqlx::query(sql)
            .bind(line.order_id)
            .bind(line.product_id.as_str())
            .bind(line.event.map(|(id, _)| id))
            .bind(line.event.map(|(_, kind)| kind))
            .bind(line.what)
            .bind(line.at);
        query.execute(self).await?;
        Ok(())
    }

    async fn history(&mut self, order: Uuid) -> sqlx::Result<Vec<HistoryEntry>> {
        let sql = "SELECT at, what, event_id, event_type FROM orders_history \
                   WHERE order_id = $1 ORDER BY id";
        let rows = sqlx::query(sql).bind(order).fetch_all(self).await?;
        rows.iter().map(entry).collect()
    }

    async fn open_procurement(
        &mut self,
        product: &ProductId,
        event: &str,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool> {
        let sql = "INSERT INTO orders_procurement (id, product_id, opened_by, opened_at) \
                   VALUES ($1, $2, $3, $4) ON CONFLICT (product_id) WHERE closed_at IS NULL DO NOTHING";
        let query = sqlx::query(sql)
            .bind(Uuid::now_v7())
            .bind(product.as_str())
            .bind(event)
            .bind(at);
        Ok(query.execute(self).await?.rows_affected() == 1)
    }

    async fn close_procurement(
        &mut self,
        product: &ProductId,
        event: &str,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool> {
        let sql = "UPDATE orders_procurement SET closed_by = $1, closed_at = $2 \
                   WHERE product_id = $3 AND closed_at IS NULL";
        let query = sqlx::query(sql).bind(event).bind(at).bind(product.as_str());
        Ok(query.execute(self).await?.rows_affected() == 1)
    }

    async fn procurements(
        &mut self,
        product: Option<&ProductId>,
    ) -> sqlx::Result<Vec<Procurement>> {
        let sql = "SELECT id, product_id, opened_at, closed_at FROM orders_procurement \
                   WHERE product_id = coalesce($1, product_id) ORDER BY opened_at DESC LIMIT $2";
        let query = sqlx::query(sql)
            .bind(product.map(ProductId::as_str))
            .bind(PROCUREMENTS);
        let rows = query.fetch_all(self).await?;
        rows.iter().map(procurement).collect()
    }
}

fn order(row: &PgRow) -> sqlx::Result<Order> {
    Ok(Order {
        id: row.try_get("id")?,
        user_id: row.try_get("user_id")?,
        product_id: product_id(row.try_get("product_id")?)?,
        quantity: quantity(row.try_get("quantity")?)?,
        status: status(row.try_get("status")?)?,
        reason: row.try_get("reason")?,
        reservation_id: row.try_get("reservation_id")?,
        created_at: row.try_get("created_at")?,
    })
}

fn entry(row: &PgRow) -> sqlx::Result<HistoryEntry> {
    Ok(HistoryEntry {
        at: row.try_get("at")?,
        what: row.try_get("what")?,
        event_id: row.try_get("event_id")?,
        event_type: row.try_get("event_type")?,
    })
}

fn procurement(row: &PgRow) -> sqlx::Result<Procurement> {
    Ok(Procurement {
        procurement_id: row.try_get("id")?,
        product_id: product_id(row.try_get("product_id")?)?,
        opened_at: row.try_get("opened_at")?,
        closed_at: row.try_get("closed_at")?,
    })
}
