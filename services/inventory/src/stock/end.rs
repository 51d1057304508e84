use pillarbox_contracts::{
    ReleaseReason, StockConfirmed, StockDepleted, StockReleased,
    http::{EndStatus, ReservationEnd},
};
use pillarbox_host::{Error, Result, Transaction, http::Correlation};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Stock, change, now, stock, unknown};
use crate::repository::{Product, Repository, Reservation, State};

impl Stock {
    /// Confirms a reservation: its stock leaves for good. Answers how the reservation really ended: whichever end came
    /// first stands, and a repeat changes nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn confirm(&self, id: Uuid, correlation: &Correlation) -> Result<ReservationEnd> {
        let outbox = correlation.on(&self.outbox);
        let mut tx = self.transactions.begin().await?;
        let (reservation, was) = locked(&mut tx, id).await?;
        let at = now();
        if !stock(&mut tx)
            .end_reservation(id, State::Confirmed, at)
            .await?
        {
            return ended(id, reservation.state);
        }
        let quantity = u64::from(reservation.quantity);
        let product = Product {
            quantity: was.quantity.saturating_sub(quantity),
            held: was.held.saturating_sub(quantity),
            ..was.clone()
        };
        change(stock(&mut tx), &was, &product).await?;
        let confirmed = StockConfirmed {
            reservation_id: id,
            order_id: reservation.order_id,
            user_id: reservation.user_id,
            product_id: reservation.product_id.clone(),
            quantity: reservation.quantity,
            confirmed_at: at,
        };
        outbox.enqueue(tx.connection(), &confirmed).await?;
        if product.quantity == 0 {
            let depleted = StockDepleted {
                product_id: reservation.product_id,
                order_id: reservation.order_id,
                user_id: reservation.user_id,
                depleted_at: at,
                // What was in the house until now: exactly what leaves.
                last_quantity: reservation.quantity,
            };
            outbox.enqueue(tx.connection(), &depleted).await?;
        }
        tx.commit(&outbox).await?;
        ended(id, State::Confirmed)
    }

    /// Gives a reservation back: its stock can be reserved again. Answers as [`Stock::confirm`] does.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn release(
        &self,
        id: Uuid,
        reason: ReleaseReason,
        correlation: &Correlation,
    ) -> Result<ReservationEnd> {
        let outbox = correlation.on(&self.outbox);
        let mut tx = self.transactions.begin().await?;
        let (reservation, was) = locked(&mut tx, id).await?;
        let released = release_held(stock(&mut tx), &reservation, &was, reason, now()).await?;
        let Some(released) = released else {
            return ended(id, reservation.state);
        };
        outbox.enqueue(tx.connection(), &released).await?;
        tx.commit(&outbox).await?;
        ended(id, State::Released)
    }
}

/// Gives back what a reservation holds, of a product that is locked; none if it holds nothing any more. The event that
/// it answers belongs into the same transaction.
///
/// # Errors
/// The database's.
pub async fn release_held(
    repository: &mut dyn Repository,
    reservation: &Reservation,
    was: &Product,
    reason: ReleaseReason,
    at: OffsetDateTime,
) -> Result<Option<StockReleased>> {
    let held = repository
        .end_reservation(reservation.id, State::Released, at)
        .await?;
    if !held {
        return Ok(None);
    }
    let product = Product {
        held: was.held.saturating_sub(reservation.quantity.into()),
        ..was.clone()
    };
    change(repository, was, &product).await?;
    Ok(Some(StockReleased {
        reservation_id: reservation.id,
        order_id: reservation.order_id,
        user_id: reservation.user_id,
        product_id: reservation.product_id.clone(),
        quantity: reservation.quantity,
        released_at: at,
        reason,
    }))
}

/// A reservation as it is now that its product is locked.
async fn locked(tx: &mut Transaction, id: Uuid) -> Result<(Reservation, Product)> {
    let not_found = || Error::NotFound(format!("there is no reservation {id}"));
    // Its product never changes, so this first look may be without a lock.
    let seen = stock(tx).reservation(id).await?.ok_or_else(not_found)?;
    let product = stock(tx).lock_product(&seen.product_id).await?;
    let product = product.ok_or_else(|| unknown(&seen.product_id))?;
    let reservation = stock(tx).reservation(id).await?.ok_or_else(not_found)?;
    Ok((reservation, product))
}

fn ended(id: Uuid, state: State) -> Result<ReservationEnd> {
    let status = match state {
        State::Confirmed => EndStatus::Confirmed,
        State::Released => EndStatus::Released,
        State::Held => {
            let text = format!("reservation {id} changed under the lock of its product");
            let error = pillarbox::Error::new(pillarbox::Kind::Database, "end reservation", text);
            return Err(Error::Engine(error));
        }
    };
    Ok(ReservationEnd {
        reservation_id: id,
        status,
    })
}
