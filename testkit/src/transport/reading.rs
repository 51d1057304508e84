//! Reading: redelivery, hand-over, groups.

use pillarbox_transport::Delivery;

use super::{Corner, GROUP, assert_all, send, soon, take};

fn ids(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(|d| d.message.id.clone()).collect()
}

pub(super) async fn redelivery(corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    let source = corner.bind(&*transport, GROUP).await;
    assert_all(
        &soon(send(&*publisher, corner.events(0..10))).await,
        "stored",
    );
    let mut from = None;
    let mut first = 0;
    // The third reader finds what the first two have left.
    for acknowledged in [2, 3, 5] {
        let mut reader = soon(transport.subscribe(&source, GROUP, from))
            .await
            .expect("a reader");
        let got = take(&mut reader, 10 - first).await;
        assert_eq!(ids(&got), corner.ids(first..10));
        for delivery in got.into_iter().take(acknowledged) {
            from = delivery.position.map(|p| p + 1);
            soon(delivery.ack.ack()).await.expect("acknowledge");
        }
        first += acknowledged;
        soon(reader.close()).await;
    }
}

pub(super) async fn hand_over(corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    let source = corner.bind(&*transport, GROUP).await;
    let mut from = None;
    let mut seen = Vec::new();
    for round in 0..4 {
        let events = round * 25..(round + 1) * 25;
        // Another process of the same group.
        let other = corner.transport();
        corner.ready(&*other).await;
        let mut reader = soon(other.subscribe(&source, GROUP, from))
            .await
            .expect("a reader");
        let published = soon(send(&*publisher, corner.events(events))).await;
        assert_all(&published, "stored");
        for delivery in take(&mut reader, 25).await {
            seen.push(delivery.message.id.clone());
            from = delivery.position.map(|p| p + 1);
            soon(delivery.ack.ack()).await.expect("acknowledge");
        }
        soon(reader.close()).await;
    }
    assert_eq!(seen, corner.ids(0..100), "each once, in order");
}

pub(super) async fn groups(corner: Box<dyn Corner>) {
    let (transport, publisher) = corner.open().await;
    let mut readers = Vec::new();
    for group in ["two", "three"] {
        let source = corner.bind(&*transport, group).await;
        let reader = soon(transport.subscribe(&source, group, None)).await;
        readers.push(reader.expect("a reader"));
    }
    let publishing = tokio::spawn(send(&*publisher, corner.events(0..50)));
    for reader in &mut readers {
        let got = take(reader, 50).await;
        assert_eq!(ids(&got), corner.ids(0..50));
        for delivery in got {
            soon(delivery.ack.ack()).await.expect("acknowledge");
        }
    }
    assert_all(&soon(publishing).await.expect("no panic"), "stored");
}
