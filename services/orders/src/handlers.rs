//! Group `orders` on `inventory.events`: one handler for each of the six types, each with an effect that can be seen.

use pillarbox::{Context, Delivery, Event, Failure, Handler};
use pillarbox_contracts::{
    ProductId, StockConfirmed, StockDepleted, StockFailed, StockReleased, StockReplenished,
    StockReserved,
};
use uuid::Uuid;

use crate::{
    change::{Scope, now},
    lifecycle::{News, Step},
    repository::{History, repository},
};

/// Moves orders on as their stock moves.
#[derive(Debug, Clone, Copy)]
pub struct StockMoved;

impl Handler<StockReserved> for StockMoved {
    async fn handle(
        &self,
        d: Delivery<StockReserved>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let event = &d.event;
        let news = News::Reserved(event.reservation_id);
        tell(cx, &d, event.order_id, &event.product_id, news).await
    }
}

impl Handler<StockConfirmed> for StockMoved {
    async fn handle(
        &self,
        d: Delivery<StockConfirmed>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let event = &d.event;
        let news = News::Confirmed(event.reservation_id);
        tell(cx, &d, event.order_id, &event.product_id, news).await
    }
}

impl Handler<StockReleased> for StockMoved {
    async fn handle(
        &self,
        d: Delivery<StockReleased>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let event = &d.event;
        let news = News::Released(event.reservation_id, event.reason);
        tell(cx, &d, event.order_id, &event.product_id, news).await
    }
}

impl Handler<StockFailed> for StockMoved {
    async fn handle(&self, d: Delivery<StockFailed>, cx: &mut Context<'_>) -> Result<(), Failure> {
        let event = &d.event;
        let news = News::Refused(event.reason);
        tell(cx, &d, event.order_id, &event.product_id, news).await
    }
}

/// Asks for more of a product that ran out, once until more has come.
#[derive(Debug, Clone, Copy)]
pub struct Procure;

impl Handler<StockDepleted> for Procure {
    async fn handle(
        &self,
        d: Delivery<StockDepleted>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let (event, id) = (&d.event, d.message.id.as_str());
        let orders = repository(cx.tx());
        let opened = orders
            .open_procurement(&event.product_id, id, now())
            .await?;
        let what = if opened {
            "procurement opened"
        } else {
            "procurement is open"
        };
        note(cx, &d, Some(event.order_id), &event.product_id, what).await
    }
}

impl Handler<StockReplenished> for Procure {
    async fn handle(
        &self,
        d: Delivery<StockReplenished>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        let (event, id) = (&d.event, d.message.id.as_str());
        let orders = repository(cx.tx());
        let closed = orders
            .close_procurement(&event.product_id, id, now())
            .await?;
        let what = if closed {
            "procurement closed"
        } else {
            "no procurement was open"
        };
        note(cx, &d, None, &event.product_id, what).await
    }
}

async fn tell<E: Event>(
    cx: &mut Context<'_>,
    delivery: &Delivery<E>,
    order_id: Uuid,
    product_id: &ProductId,
    news: News,
) -> Result<(), Failure> {
    let order = repository(cx.tx()).lock_order(order_id).await?;
    let what = match order {
        // Reserved for somebody else than this service.
        None => "unknown order",
        Some(order) => {
            let (order, step) = Scope::Handler(cx).tell(order, news, now()).await?;
            match step {
                Step::To(..) => order.status.as_str(),
                Step::TellAgain => "ended before: told again",
                Step::Stay => "no change",
            }
        }
    };
    note(cx, delivery, Some(order_id), product_id, what).await
}

async fn note<E: Event>(
    cx: &mut Context<'_>,
    delivery: &Delivery<E>,
    order_id: Option<Uuid>,
    product_id: &ProductId,
    what: &str,
) -> Result<(), Failure> {
    let line = History {
        order_id,
        product_id,
        event: Some((&delivery.message.id, E::TYPE)),
        what,
        at: now(),
    };
    repository(cx.tx()).add_history(&line).await?;
    Ok(())
}
