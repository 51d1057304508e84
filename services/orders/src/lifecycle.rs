//! An order's way, as a pure function: from where it stands and what it is told to what follows. Never moves back.
//!
//! The reservation at the inventory service is the arbiter: an order whose stock is held is `confirmed` or `cancelled`
//! only once that service has said so, whichever call or event says it first.

use pillarbox_contracts::{ReleaseReason, http::Status};
use uuid::Uuid;

use crate::repository::Order;

/// What an order is told, by an event or by an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// Its stock is held.
    Reserved(Uuid),
    /// It gets no stock.
    Refused(pillarbox_contracts::Refusal),
    /// Its stock has left.
    Confirmed(Uuid),
    /// Its stock was given back.
    Released(Uuid, ReleaseReason),
    /// Somebody wants it confirmed.
    ConfirmWanted,
    /// Somebody wants it cancelled.
    CancelWanted,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It moves on.
    To(Status, Option<&'static str>),
    /// It stays: it is there already, or the news comes late.
    Stay,
    /// It has ended, and the other side does not know yet: it is told again.
    TellAgain,
}

/// What follows for an order from a piece of news.
#[must_use]
pub fn next(order: &Order, news: News) -> Step {
    use Status::{Cancelled, Cancelling, Confirmed, Confirming, Failed, Pending, Reserved};
    if let News::Confirmed(id) | News::Released(id, _) = news
        && order.reservation_id.is_some_and(|own| own != id)
    {
        // About an earlier reservation of this order.
        return Step::Stay;
    }
    match (news, order.status) {
        (News::Reserved(_), Pending) => Step::To(Reserved, None),
        // Stock was reserved for an order that has ended: its end event, anew, gives it back.
        (News::Reserved(_), Failed | Cancelled) => Step::TellAgain,
        (News::Refused(reason), Pending) => Step::To(Failed, Some(reason.as_str())),
        (News::Confirmed(_), Pending | Reserved | Confirming | Cancelling) => {
            Step::To(Confirmed, None)
        }
        (News::Released(_, reason), Pending | Reserved | Confirming | Cancelling) => {
            let end = match reason {
                ReleaseReason::Expired => Failed,
                ReleaseReason::ManualRelease | ReleaseReason::OrderCancelled => Cancelled,
            };
            Step::To(end, Some(reason.as_str()))
        }
        (News::ConfirmWanted, Reserved) => Step::To(Confirming, None),
        // Nothing of it can have been confirmed: only an order that is reserved asks for that. A reservation that is
        // still under way is given back, or refused, because inventory hears of the end.
        (News::CancelWanted, Pending) => {
            Step::To(Cancelled, Some(ReleaseReason::OrderCancelled.as_str()))
        }
        (News::CancelWanted, Reserved | Confirming) => Step::To(Cancelling, None),
        _ => Step::Stay,
    }
}

/// Whether nothing can follow any more.
#[must_use]
pub fn is_end(status: Status) -> bool {
    matches!(
        status,
        Status::Confirmed | Status::Failed | Status::Cancelled
    )
}

#[cfg(test)]
mod tests {
    use pillarbox_contracts::{Quantity, Refusal};
    use time::OffsetDateTime;

    use super::*;

    const OWN: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    const ALL: [Status; 7] = [
        Status::Pending,
        Status::Reserved,
        Status::Confirming,
        Status::Cancelling,
        Status::Confirmed,
        Status::Failed,
        Status::Cancelled,
    ];

    fn order(status: Status) -> Order {
        Order {
            id: Uuid::nil(),
            user_id: Uuid::nil(),
            product_id: "sku".parse().unwrap(),
            quantity: Quantity::new(1).unwrap(),
            status,
            reason: None,
            reservation_id: (status != Status::Pending).then_some(OWN),
            created_at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    fn every_news() -> Vec<News> {
        vec![
            News::Reserved(OWN),
            News::Refused(Refusal::InsufficientStock),
            News::Confirmed(OWN),
            News::Released(OWN, ReleaseReason::ManualRelease),
            News::Released(OWN, ReleaseReason::OrderCancelled),
            News::Released(OWN, ReleaseReason::Expired),
            News::ConfirmWanted,
            News::CancelWanted,
        ]
    }

    /// How far along its way.
    fn rank(status: Status) -> u8 {
        match status {
            Status::Pending => 0,
            Status::Reserved => 1,
            Status::Confirming => 2,
            Status::Cancelling => 3,
            Status::Confirmed | Status::Failed | Status::Cancelled => 4,
        }
    }

    #[test]
    fn nothing_moves_an_order_back_or_out_of_its_end() {
        for status in ALL {
            for news in every_news() {
                match next(&order(status), news) {
                    Step::To(to, _) => assert!(rank(to) > rank(status), "{status} {news:?} {to}"),
                    Step::TellAgain => assert!(is_end(status), "{status} {news:?}"),
                    Step::Stay => {}
                }
            }
        }
    }

    #[test]
    fn only_the_arbiter_ends_an_order_that_holds_stock() {
        for status in [Status::Reserved, Status::Confirming, Status::Cancelling] {
            for news in [News::ConfirmWanted, News::CancelWanted] {
                if let Step::To(to, _) = next(&order(status), news) {
                    assert!(!is_end(to), "{status} {news:?} {to}");
                }
            }
        }
    }

    #[test]
    fn a_confirmation_that_beat_a_cancellation_stands() {
        let step = next(&order(Status::Cancelling), News::Confirmed(OWN));
        assert_eq!(step, Step::To(Status::Confirmed, None));
    }

    #[test]
    fn stock_that_is_reserved_for_an_ended_order_is_answered() {
        for status in [Status::Failed, Status::Cancelled] {
            assert_eq!(next(&order(status), News::Reserved(OTHER)), Step::TellAgain);
        }
        assert_eq!(
            next(&order(Status::Confirmed), News::Reserved(OWN)),
            Step::Stay
        );
    }

    #[test]
    fn news_of_another_reservation_changes_nothing() {
        for news in [
            News::Confirmed(OTHER),
            News::Released(OTHER, ReleaseReason::Expired),
        ] {
            assert_eq!(next(&order(Status::Reserved), news), Step::Stay);
        }
    }
}
