use pillarbox::Outbox;
use pillarbox_contracts::{
    Refusal, StockDepleted, StockFailed, StockReserved,
    http::{Refused, Reserve, Reserved},
};
use pillarbox_host::{Result, Transaction, http::Correlation};
use uuid::Uuid;

use super::{Stock, change, now, stock};
use crate::repository::{Product, Reservation, State};

/// What a look at product and order, both locked, has shown.
enum Decision {
    Hold(Product),
    /// The request was carried out before; its answer was lost.
    Repeat(Reservation),
    Refuse(Refused),
}

impl Stock {
    /// Reserves, or refuses. A refusal is an event too: it is how the order learns of it when this answer is lost.
    ///
    /// # Errors
    /// The database's. The order may ask again: it gets the same reservation.
    pub async fn reserve(
        &self,
        wanted: &Reserve,
        correlation: &Correlation,
    ) -> Result<Result<Reserved, Refused>> {
        let outbox = correlation.on(&self.outbox);
        let mut tx = self.transactions.begin().await?;
        let answer = match decide(&mut tx, wanted).await? {
            Decision::Hold(product) => Ok(self.hold(&mut tx, &outbox, wanted, &product).await?),
            Decision::Repeat(reservation) => Ok(Reserved {
                reservation_id: reservation.id,
                expires_at: reservation.expires_at,
            }),
            Decision::Refuse(refused) => {
                let failed = StockFailed {
                    order_id: wanted.order_id,
                    user_id: wanted.user_id,
                    product_id: wanted.product_id.clone(),
                    requested: wanted.quantity,
                    available: refused.available,
                    reason: refused.reason,
                };
                outbox.enqueue(tx.connection(), &failed).await?;
                Err(refused)
            }
        };
        tx.commit(&outbox).await?;
        let outcome = match &answer {
            Ok(_) => "reserved",
            Err(refused) => refused.reason.as_str(),
        };
        metrics::counter!("inventory_reservations_total", "outcome" => outcome).increment(1);
        Ok(answer)
    }

    async fn hold(
        &self,
        tx: &mut Transaction,
        outbox: &Outbox,
        wanted: &Reserve,
        was: &Product,
    ) -> Result<Reserved> {
        let at = now();
        let reservation = Reservation {
            id: Uuid::now_v7(),
            order_id: wanted.order_id,
            user_id: wanted.user_id,
            product_id: wanted.product_id.clone(),
            quantity: wanted.quantity,
            state: State::Held,
            expires_at: at + self.hold,
        };
        let product = Product {
            held: was.held + u64::from(wanted.quantity),
            ..was.clone()
        };
        change(stock(tx), was, &product).await?;
        stock(tx).add_reservation(&reservation).await?;
        let reserved = StockReserved {
            reservation_id: reservation.id,
            order_id: wanted.order_id,
            user_id: wanted.user_id,
            product_id: wanted.product_id.clone(),
            quantity: wanted.quantity,
            expires_at: reservation.expires_at,
        };
        outbox.enqueue(tx.connection(), &reserved).await?;
        if product.available() == 0 {
            let depleted = StockDepleted {
                product_id: wanted.product_id.clone(),
                order_id: wanted.order_id,
                user_id: wanted.user_id,
                depleted_at: at,
                // What was available until now: exactly what this order has taken.
                last_quantity: wanted.quantity,
            };
            outbox.enqueue(tx.connection(), &depleted).await?;
        }
        Ok(Reserved {
            reservation_id: reservation.id,
            expires_at: reservation.expires_at,
        })
    }
}

async fn decide(tx: &mut Transaction, wanted: &Reserve) -> Result<Decision> {
    let product = stock(tx).lock_product(&wanted.product_id).await?;
    let ended = stock(tx).lock_order(wanted.order_id).await?;
    let available = product.as_ref().map_or(0, Product::available);
    let refuse = |reason| Ok(Decision::Refuse(Refused { reason, available }));
    if ended {
        return refuse(Refusal::OrderEnded);
    }
    let Some(product) = product else {
        return refuse(Refusal::UnknownProduct);
    };
    let live = stock(tx)
        .live_reservation(wanted.order_id, &wanted.product_id)
        .await?;
    match live {
        Some(live) if live.quantity == wanted.quantity => Ok(Decision::Repeat(live)),
        Some(_) => refuse(Refusal::AlreadyReserved),
        None if available < wanted.quantity.into() => refuse(Refusal::InsufficientStock),
        None => Ok(Decision::Hold(product)),
    }
}
