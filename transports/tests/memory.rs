//! What `Stored` means where nothing is stored: every group that wants the event has committed it.
#![allow(clippy::unwrap_used)]

use futures_util::FutureExt as _;
use pillarbox_transport::{
    Binding, Kind, Message, Outcome, Source, Subscription, Transport as _, memory::Memory,
};

const TOPIC: &str = "shop.events";

async fn bind(memory: &Memory, group: &str) -> Source {
    let binding = Binding {
        topic: TOPIC.to_owned(),
        group: group.to_owned(),
        kinds: vec!["placed".to_owned()],
    };
    memory.bind(&binding).await.unwrap().remove(0)
}

async fn read(memory: &Memory, group: &str) -> Box<dyn Subscription> {
    let source = bind(memory, group).await;
    memory.subscribe(&source, group, None).await.unwrap()
}

async fn publish(memory: &Memory, kind: &str) -> Outcome {
    let publisher = memory.publisher().await.unwrap();
    let messages = vec![Message::new("1", TOPIC, kind, "{}").into()];
    publisher.publish(messages).await.remove(0)
}

#[tokio::test]
async fn stored_means_that_every_group_has_committed() {
    let memory = Memory::new();
    let (mut one, mut two) = (read(&memory, "one").await, read(&memory, "two").await);
    let answer = publish(&memory, "placed");
    tokio::pin!(answer);
    assert!(answer.as_mut().now_or_never().is_none());
    one.next().await.unwrap().ack.ack().await.unwrap();
    assert!(answer.as_mut().now_or_never().is_none());
    two.next().await.unwrap().ack.ack().await.unwrap();
    assert!(matches!(answer.await, Outcome::Stored));
}

#[tokio::test]
async fn a_group_that_ends_has_not_committed() {
    let memory = Memory::new();
    let (mut one, two) = (read(&memory, "one").await, read(&memory, "two").await);
    let answer = publish(&memory, "placed");
    tokio::pin!(answer);
    assert!(answer.as_mut().now_or_never().is_none());
    one.next().await.unwrap().ack.ack().await.unwrap();
    two.close().await;
    assert!(matches!(answer.await, Outcome::Unavailable(_)));
}

#[tokio::test]
async fn without_readers_nothing_is_stored() {
    let memory = Memory::new();
    let unavailable = |outcome| match outcome {
        Outcome::Unavailable(e) => e.kind(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        unavailable(publish(&memory, "placed").await),
        Kind::Unrouted
    );
    bind(&memory, "one").await;
    assert_eq!(unavailable(publish(&memory, "placed").await), Kind::Missing);
    let unwanted = publish(&memory, "shipped").await;
    assert!(matches!(unwanted, Outcome::Retry(e) if e.kind() == Kind::Unrouted));
}
