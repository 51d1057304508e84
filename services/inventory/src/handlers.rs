//! Group `inventory` on `orders.events`: an order that has ended without its stock gives back what it still holds.

use pillarbox::{Context, Delivery, Event, Failure, Handler};
use pillarbox_contracts::{OrderCancelled, OrderFacts, OrderFailed, ReleaseReason};

use crate::{
    repository::{Effect, repository},
    stock::{now, release_held},
};

/// Remembers an order as ended, so that a late reservation for it is refused, and releases what it holds.
#[derive(Debug, Clone, Copy)]
pub struct OrderEnded;

impl Handler<OrderCancelled> for OrderEnded {
    async fn handle(
        &self,
        delivery: Delivery<OrderCancelled>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        end(cx, &delivery, &delivery.event.0).await
    }
}

impl Handler<OrderFailed> for OrderEnded {
    async fn handle(
        &self,
        delivery: Delivery<OrderFailed>,
        cx: &mut Context<'_>,
    ) -> Result<(), Failure> {
        end(cx, &delivery, &delivery.event.0).await
    }
}

async fn end<E: Event>(
    cx: &mut Context<'_>,
    delivery: &Delivery<E>,
    order: &OrderFacts,
) -> Result<(), Failure> {
    let (order_id, product_id) = (order.order_id, &order.product_id);
    let at = now();
    // The product before the order, as everywhere, so that no two transactions wait for each other.
    let product = repository(cx.tx()).lock_product(product_id).await?;
    repository(cx.tx()).end_order(order_id, E::TYPE).await?;
    let live = repository(cx.tx())
        .live_reservation(order_id, product_id)
        .await?;
    let mut released = 0;
    if let (Some(product), Some(live)) = (product, live) {
        let reason = ReleaseReason::OrderCancelled;
        let event = release_held(repository(cx.tx()), &live, &product, reason, at).await?;
        // None: the order was confirmed first, and stock that has left does not come back.
        if let Some(event) = event {
            released = event.quantity.into();
            cx.enqueue(&event).await?;
        }
    }
    let effect = Effect {
        event_id: &delivery.message.id,
        event_type: E::TYPE,
        order_id,
        released,
        applied_at: at,
    };
    repository(cx.tx()).add_effect(&effect).await?;
    Ok(())
}
