use async_trait::async_trait;
use pillarbox_contracts::{ProductId, Quantity};
use sqlx::{PgConnection, Row as _, postgres::PgRow};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    Effect, Product, Repository, Reservation, State, number, product_id, quantity, stored,
};

#[async_trait]
impl Repository for PgConnection {
    async fn add_product(&mut self, id: &ProductId, quantity: u64) -> sqlx::Result<bool> {
        let sql = "INSERT INTO inventory_product (id, initial, quantity) VALUES ($1, $2, $2) \
                   ON CONFLICT (id) DO NOTHING";
        let query = sqlx::query(sql).bind(id.as_str()).bind(stored(quantity)?);
        Ok(query.execute(self).await?.rows_affected() == 1)
    }

    async fn product(&mut self, id: &ProductId) -> sqlx::Result<Option<Product>> {
        let sql = "SELECT id, quantity, held FROM inventory_product WHERE id = $1";
        let row = sqlx::query(sql)
            .bind(id.as_str())
            .fetch_optional(self)
            .await?;
        row.as_ref().map(product).transpose()
    }

    async fn lock_product(&mut self, id: &ProductId) -> sqlx::Result<Option<Product>> {
        let sql = "SELECT id, quantity, held FROM inventory_product WHERE id = $1 FOR UPDATE";
        let row = sqlx::query(sql)
            .bind(id.as_str())
            .fetch_optional(self)
            .await?;
        row.as_ref().map(product).transpose()
    }

    async fn change_stock(&mut self, was: &Product, now: &Product) -> sqlx::Result<bool> {
        let sql = "UPDATE inventory_product SET quantity = $1, held = $2 \
                   WHERE id = $3 AND quantity = $4 AND held = $5";
        let query = sqlx::query(sql)
            .bind(stored(now.quantity)?)
            .bind(stored(now.held)?)
            .bind(was.id.as_str())
            .bind(stored(was.quantity)?)
            .bind(stored(was.held)?);
        Ok(query.execute(self).await?.rows_affected() == 1)
    }

    async fn lock_order(&mut self, id: Uuid) -> sqlx::Result<bool> {
        // The update changes nothing; it takes the lock and sees the newest row.
        let sql = "INSERT INTO inventory_order (id) VALUES ($1) \
                   ON CONFLICT (id) DO UPDATE SET id = excluded.id RETURNING ended_by IS NOT NULL";
        sqlx::query_scalar(sql).bind(id).fetch_one(self).await
    }

    async fn end_order(&mut self, id: Uuid, by: &str) -> sqlx::Result<()> {
        let sql = "INSERT INTO inventory_order (id, ended_by) VALUES ($1, $2) \
                   ON CONFLICT (id) DO UPDATE SET ended_by = coalesce(inventory_order.ended_by, excluded.ended_by)";
        sqlx::query(sql).bind(id).bind(by).execute(self).await?;
        Ok(())
    }

    async fn live_reservation(
        &mut self,
        order: Uuid,
        product: &ProductId,
    ) -> sqlx::Result<Option<Reservation>> {
        let sql = "SELECT * FROM inventory_reservation \
                   WHERE order_id = $1 AND product_id = $2 AND state IN ('held', 'confirmed')";
        let query = sqlx::query(sql).bind(order).bind(product.as_str());
        let row = query.fetch_optional(self).await?;
        row.as_ref().map(reservation).transpose()
    }

    async fn reservation(&mut self, id: Uuid) -> sqlx::Result<Option<Reservation>> {
        let sql = "SELECT * FROM inventory_reservation WHERE id = $1";
        let row = sqlx::query(sql).bind(id).fetch_optional(self).await?;
        row.as_ref().map(reservation).transpose()
    }

    async fn add_reservation(&mut self, r: &Reservation) -> sqlx::Result<()> {
        let sql = "INSERT INTO inventory_reservation \
                   (id, order_id, user_id, product_id, quantity, state, expires_at) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7)";
        let query = sqlx::query(sql)
            .bind(r.id)
            .bind(r.order_id)
            .bind(r.user_id)
            .bind(r.product_id.as_str())
            .bind(i64::from(r.quantity))
            .bind(r.state.as_str())
            .bind(r.expires_at);
        query.execute(self).await?;
        Ok(())
    }

    async fn end_reservation(
        &mut self,
        id: Uuid,
        to: State,
        at: OffsetDateTime,
    ) -> sqlx::Result<bool> {
        let sql = "UPDATE inventory_reservation SET state = $1, ended_at = $2 \
                   WHERE id = $3 AND state = 'held'";
        let query = sqlx::query(sql).bind(to.as_str()).bind(at).bind(id);
        Ok(query.execute(self).await?.rows_affected() == 1)
    }

    async fn add_restock(
        &mut self,
        product: &ProductId,
        quantity: Quantity,
        at: OffsetDateTime,
    ) -> sqlx::Result<()> {
        let sql = "INSERT INTO inventory_restock (id, product_id, quantity, arrived_at) \
                   VALUES ($1, $2, $3, $4)";
        let query = sqlx::query(sql)
            .bind(Uuid::now_v7())
            .bind(product.as_str())
            .bind(i64::from(quantity))
            .bind(at);
        query.execute(self).await?;
        Ok(())
    }

    async fn add_effect(&mut self, effect: &Effect<'_>) -> sqlx::Result<()> {
        let sql = "INSERT INTO inventory_effect \
                   (event_id, event_type, order_id, released, applied_at) VALUES ($1, $2, $3, $4, $5)";
        let query = sqlx::query(sql)
            .bind(effect.event_id)
            .bind(effect.event_type)
            .bind(effect.order_id)
            .bind(stored(effect.released)?)
            .bind(effect.applied_at);
        query.execute(self).await?;
        Ok(())
    }
}

fn product(row: &PgRow) -> sqlx::Result<Product> {
    Ok(Product {
        id: product_id(row.try_get("id")?)?,
        quantity: number(row.try_get("quantity")?)?,
        held: number(row.try_get("held")?)?,
    })
}

fn reservation(row: &PgRow) -> sqlx::Result<Reservation> {
    Ok(Reservation {
        id: row.try_get("id")?,
        order_id: row.try_get("order_id")?,
        user_id: row.try_get("user_id")?,
        product_id: product_id(row.try_get("product_id")?)?,
        quantity: quantity(row.try_get("quantity")?)?,
        state: State::read(row.try_get("state")?)?,
        expires_at: row.try_get("expires_at")?,
    })
}
