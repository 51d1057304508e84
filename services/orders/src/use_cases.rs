//! What customers do: place an order, confirm it, cancel it, look at it.
//!
//! Whatever is to happen is committed before inventory is called, and what has happened is believed only from its answer
//! or its events: a crash or a lost answer at any point leaves an order that can go on.

use pillarbox::Outbox;
use pillarbox_contracts::{
    OrderCreated, ProductId, Refusal,
    http::{EndStatus, NewOrder, OrderView, Procurement, Reserve, Status},
};
use pillarbox_host::{Error, Result, Transactions, http::Correlation};
use uuid::Uuid;

use crate::{
    change::{Scope, by_request, facts, now},
    client::{Away, InventoryClient},
    lifecycle::{News, Step},
    repository::{Order, repository},
};

/// The use cases of the orders service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Orders {
    transactions: Transactions,
    outbox: Outbox,
    inventory: InventoryClient,
}

/// What an order is wanted to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Confirmed.
    Confirm,
    /// Cancelled.
    Cancel,
}

impl Orders {
    /// On the outbox's database.
    ///
    /// # Errors
    /// See [`Transactions::new`].
    pub fn new(outbox: Outbox, inventory: InventoryClient) -> Result<Self> {
        Ok(Self {
            transactions: Transactions::new(outbox.database())?,
            outbox,
            inventory,
        })
    }

    /// Places an order, and has its stock reserved. Whether that worked the order learns by an event, also when this
    /// call's answer is lost; while inventory is away it stays pending.
    ///
    /// # Errors
    /// The database's: then there is no order.
    pub async fn place(&self, new: &NewOrder, correlation: &Correlation) -> Result<Order> {
        let order = self.commit(new, correlation).await?;
        self.ask_for_stock(&order, correlation).await;
        Ok(order)
    }

    async fn commit(&self, new: &NewOrder, correlation: &Correlation) -> Result<Order> {
        let at = now();
        let order = Order {
            id: Uuid::now_v7(),
            user_id: new.user_id,
            product_id: new.product_id.clone(),
            quantity: new.quantity,
            status: Status::Pending,
            reason: None,
            reservation_id: None,
            created_at: at,
        };
        let outbox = correlation.on(&self.outbox);
        let mut tx = self.transactions.begin().await?;
        let mut scope = Scope::Request(&mut tx, &outbox);
        scope.orders().add_order(&order).await?;
        scope
            .orders()
            .add_history(&by_request(&order, "placed", at))
            .await?;
        scope.enqueue(&OrderCreated(facts(&order, at))).await?;
        tx.commit(&outbox).await?;
        Ok(order)
    }

    async fn ask_for_stock(&self, order: &Order, correlation: &Correlation) {
        let (product, quantity) = (&order.product_id, order.quantity);
        match self
            .inventory
            .availability(product, quantity, correlation)
            .await
        {
            // Advice: only an attempt makes the refusal an event, and somebody may give stock back meanwhile.
            Ok(Some(advice)) if advice.sufficient => {}
            Ok(_) => tracing::debug!(order = %order.id, "inventory advises against it"),
            Err(reason) => tracing::debug!(order = %order.id, %reason, "no advice"),
        }
        let wanted = Reserve {
            order_id: order.id,
            user_id: order.user_id,
            product_id: product.clone(),
            quantity,
        };
        match self.inventory.reserve(&wanted, correlation).await {
            Ok(Ok(_)) => {}
            Ok(Err(refused)) => {
                let reason = refused.reason;
                tracing::debug!(order = %order.id, %reason, "inventory refuses");
                if reason == Refusal::AlreadyReserved {
                    tracing::error!(order = %order.id, "inventory holds another quantity for it");
                }
            }
            Err(reason) => {
                tracing::warn!(order = %order.id, %reason, "inventory is away: it stays pending");
            }
        }
    }

    /// An order with its history.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn view(&self, id: Uuid) -> Result<OrderView> {
        let mut reading = self.transactions.read().await?;
        let order = repository(reading.connection()).order(id).await?;
        let order = order.ok_or_else(|| unknown(id))?;
        let history = repository(reading.connection()).history(id).await?;
        Ok(OrderView {
            order_id: order.id,
            user_id: order.user_id,
            product_id: order.product_id,
            quantity: order.quantity,
            status: order.status,
            reason: order.reason,
            reservation_id: order.reservation_id,
            created_at: order.created_at,
            history,
        })
    }

    /// The newest procurement requests, of one product or of all.
    ///
    /// # Errors
    /// The database's.
    pub async fn procurements(&self, product: Option<&ProductId>) -> Result<Vec<Procurement>> {
        let mut reading = self.transactions.read().await?;
        Ok(repository(reading.connection())
            .procurements(product)
            .await?)
    }

    /// Confirms or cancels an order. Answers where it stands then: at its end, or still on the way to it while
    /// inventory is away; asking again goes on from there.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] if the order can no longer become what is wanted, or not yet.
    pub async fn wish(&self, id: Uuid, wish: Wish, correlation: &Correlation) -> Result<Order> {
        let order = self.intend(id, wish, correlation).await?;
        let Some(reservation) = order
            .reservation_id
            .filter(|_| order.status == wish.on_the_way())
        else {
            return Ok(order);
        };
        let answer = match wish {
            Wish::Confirm => self.inventory.confirm(reservation, correlation).await,
            Wish::Cancel => self.inventory.release(reservation, correlation).await,
        };
        let end = match answer {
            Ok(end) => end,
            Err(Away::Now(reason)) => {
                tracing::warn!(order = %id, %reason, "inventory is away: the intention stands");
                return Ok(order);
            }
            Err(Away::Misunderstood(reason)) => {
                tracing::error!(order = %id, %reason, "inventory does not understand");
                return Ok(order);
            }
        };
        self.learn(id, reservation, end, wish, correlation).await
    }

    /// Commits what is to happen, so that it outlives this call.
    async fn intend(&self, id: Uuid, wish: Wish, correlation: &Correlation) -> Result<Order> {
        let outbox = correlation.on(&self.outbox);
        let mut tx = self.transactions.begin().await?;
        let mut scope = Scope::Request(&mut tx, &outbox);
        let order = scope.orders().lock_order(id).await?;
        let order = order.ok_or_else(|| unknown(id))?;
        let at = now();
        let (order, step) = scope.tell(order, wish.news(), at).await?;
        match step {
            Step::To(..) => {
                let line = by_request(&order, wish.wanted(), at);
                scope.orders().add_history(&line).await?;
                tx.commit(&outbox).await?;
                Ok(order)
            }
            // Asked before: go on, or answer the same.
            _ if order.status == wish.on_the_way() || order.status == wish.end() => Ok(order),
            _ => Err(Error::Conflict(format!(
                "order {id} is {} and cannot be {} now",
                order.status,
                wish.end()
            ))),
        }
    }

    /// Takes over what inventory has answered. The event that says the same may have been faster.
    async fn learn(
        &self,
        id: Uuid,
        reservation: Uuid,
        end: EndStatus,
        wish: Wish,
        correlation: &Correlation,
    ) -> Result<Order> {
        let outbox = correlation.on(&self.outbox);
        let mut tx = self.transactions.begin().await?;
        let mut scope = Scope::Request(&mut tx, &outbox);
        let order = scope.orders().lock_order(id).await?;
        let order = order.ok_or_else(|| unknown(id))?;
        let news = match (end, wish) {
            (EndStatus::Confirmed, _) => News::Confirmed(reservation),
            (EndStatus::Released, Wish::Cancel) => News::Released(
                reservation,
                pillarbox_contracts::ReleaseReason::OrderCancelled,
            ),
            // Given back for a reason that only the event knows.
            (EndStatus::Released, Wish::Confirm) => return Err(lost(&order)),
        };
        let at = now();
        let (order, step) = scope.tell(order, news, at).await?;
        if let Step::To(status, _) = step {
            let line = by_request(&order, status.as_str(), at);
            scope.orders().add_history(&line).await?;
            tx.commit(&outbox).await?;
        }
        if order.status == wish.end() {
            return Ok(order);
        }
        Err(lost(&order))
    }
}

impl Wish {
    fn news(self) -> News {
        match self {
            Self::Confirm => News::ConfirmWanted,
            Self::Cancel => News::CancelWanted,
        }
    }

    fn wanted(self) -> &'static str {
        match self {
            Self::Confirm => "confirmation wanted",
            Self::Cancel => "cancellation wanted",
        }
    }

    fn on_the_way(self) -> Status {
        match self {
            Self::Confirm => Status::Confirming,
            Self::Cancel => Status::Cancelling,
        }
    }

    /// Where it is to end.
    #[must_use]
    pub fn end(self) -> Status {
        match self {
            Self::Confirm => Status::Confirmed,
            Self::Cancel => Status::Cancelled,
        }
    }
}

fn unknown(id: Uuid) -> Error {
    Error::NotFound(format!("there is no order {id}"))
}

/// The other end of the reservation came first.
fn lost(order: &Order) -> Error {
    let text = match order.status {
        Status::Confirmed => "its stock has left already",
        _ => "its stock was given back already",
    };
    Error::Conflict(format!("order {} cannot have that: {text}", order.id))
}
