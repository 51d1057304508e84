//! How an order changes: row, history and end event together, in a request's transaction or a handler's.

use pillarbox::{Context, Event, Outbox};
use pillarbox_contracts::{OrderCancelled, OrderConfirmed, OrderFacts, OrderFailed, http::Status};
use pillarbox_host::{Error, Result, Transaction};
use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    lifecycle::{News, Step, next},
    repository::{History, Order, Repository, repository},
};

/// The transaction that a change is written in.
pub(crate) enum Scope<'a, 'c> {
    /// A request's.
    Request(&'a mut Transaction, &'a Outbox),
    /// A handler's; what it enqueues carries on the handled event's correlation.
    Handler(&'a mut Context<'c>),
}

impl Scope<'_, '_> {
    pub(crate) fn orders(&mut self) -> &mut dyn Repository {
        match self {
            Self::Request(tx, _) => repository(tx.connection()),
            Self::Handler(cx) => repository(cx.tx()),
        }
    }

    pub(crate) async fn enqueue<E: Event + Serialize + Sync>(&mut self, event: &E) -> Result<()> {
        match self {
            Self::Request(tx, outbox) => outbox.enqueue(tx.connection(), event).await?,
            Self::Handler(cx) => cx.enqueue(event).await?,
        };
        Ok(())
    }

    /// Tells a locked order a piece of news and does what follows. Answers the order as it is now.
    pub(crate) async fn tell(
        &mut self,
        was: Order,
        news: News,
        at: OffsetDateTime,
    ) -> Result<(Order, Step)> {
        let step = next(&was, news);
        match step {
            Step::Stay => Ok((was, step)),
            Step::TellAgain => {
                self.announce_end(&was, at).await?;
                Ok((was, step))
            }
            Step::To(status, reason) => {
                let reservation_id = match news {
                    News::Reserved(id) | News::Confirmed(id) | News::Released(id, _) => Some(id),
                    _ => was.reservation_id,
                };
                let order = Order {
                    status,
                    reason: reason.map(str::to_owned),
                    reservation_id,
                    ..was.clone()
                };
                if !self.orders().move_order(&was, &order, at).await? {
                    return Err(moved(was.id));
                }
                self.announce_end(&order, at).await?;
                Ok((order, step))
            }
        }
    }

    /// The event of an order's end, if it has ended.
    async fn announce_end(&mut self, order: &Order, at: OffsetDateTime) -> Result<()> {
        let facts = facts(order, at);
        match order.status {
            Status::Confirmed => self.enqueue(&OrderConfirmed(facts)).await,
            Status::Failed => self.enqueue(&OrderFailed(facts)).await,
            Status::Cancelled => self.enqueue(&OrderCancelled(facts)).await,
            _ => Ok(()),
        }
    }
}

/// What every event of the order says.
pub(crate) fn facts(order: &Order, at: OffsetDateTime) -> OrderFacts {
    OrderFacts {
        order_id: order.id,
        user_id: order.user_id,
        product_id: order.product_id.clone(),
        quantity: order.quantity,
        reason: order.reason.clone(),
        at,
    }
}

/// A line of an order's history that a request has written.
pub(crate) fn by_request<'a>(order: &'a Order, what: &'a str, at: OffsetDateTime) -> History<'a> {
    History {
        order_id: Some(order.id),
        product_id: &order.product_id,
        event: None,
        what,
        at,
    }
}

/// Now, as exactly as both databases can store it.
pub(crate) fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc().truncate_to_microsecond()
}

fn moved(id: Uuid) -> Error {
    // Behind the lock this cannot be; if it is, nothing may be built on it.
    let text = format!("order {id} changed under its lock");
    Error::Engine(pillarbox::Error::new(
        pillarbox::Kind::Database,
        "move order",
        text,
    ))
}
