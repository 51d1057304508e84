//! The raw client that the relay is measured against: lapin, mandatory, persistent, windowed confirms.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, future::try_join_all, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};

use crate::{
    Measured,
    stage::{KIND, TOPIC},
};

/// Publishes `events` bodies over `channels` channels of one connection, at most `in_flight` unconfirmed in all.
pub(crate) async fn publish(
    url: &str,
    events: u32,
    bytes: u32,
    channels: u16,
    in_flight: usize,
) -> Measured<Duration> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let share = events / u32::from(channels);
    let window = in_flight / usize::from(channels);
    let mut open = Vec::new();
    for _ in 0..channels {
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        open.push(channel);
    }
    let body = ".".repeat(usize::try_from(bytes)?);
    let started = Instant::now();
    let tasks = open
        .into_iter()
        .map(|channel| tokio::spawn(on(channel, share, window, body.clone())));
    for ended in try_join_all(tasks).await? {
        ended?;
    }
    let took = started.elapsed();
    // Its channels are closing already; what matters was confirmed.
    let _ = connection.close(200, "done".into()).await;
    Ok(took)
}

async fn on(channel: Channel, events: u32, window: usize, body: String) -> Measured<()> {
    let mut open = FuturesUnordered::new();
    for n in 0..events {
        let properties = envelope(n);
        let options = BasicPublishOptions {
            mandatory: true,
            ..Default::default()
        };
        let confirm = channel
            .basic_publish(
                TOPIC.into(),
                KIND.into(),
                options,
                body.as_bytes(),
                properties,
            )
            .await?;
        open.push(confirm);
        while open.len() >= window {
            confirmed(open.next().await)?;
        }
    }
    while !open.is_empty() {
        confirmed(open.next().await)?;
    }
    Ok(())
}

/// The same properties and headers as the relay's messages have: what is compared is the way to the broker, not the load.
fn envelope(n: u32) -> BasicProperties {
    let id = uuid::Uuid::now_v7().to_string();
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("specversion", "1.0".to_owned()),
        ("id", id.clone()),
        ("type", KIND.to_owned()),
        ("time", "2026-01-01T00:00:00.123456Z".to_owned()),
        ("partitionkey", format!("key-{}", n % 1_000)),
        ("dataversion", "1".to_owned()),
        ("pillarboxepoch", "1".to_owned()),
        ("pillarboxposition", n.to_string()),
        ("source", "bench".to_owned()),
    ] {
        let value = AMQPValue::LongString(value.into());
        headers.insert(format!("cloudEvents_{name}").into(), value);
    }
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(id.into())
        .with_type(KIND.into())
        .with_timestamp(1_767_225_600)
        .with_content_type("text/plain".into())
        .with_app_id("bench".into())
        .with_headers(headers)
}

fn confirmed(answer: Option<lapin::Result<Confirmation>>) -> Measured<()> {
    match answer {
        Some(Ok(Confirmation::Ack(None))) => Ok(()),
        Some(Ok(other)) => Err(format!("the broker answered {other:?}").into()),
        Some(Err(e)) => Err(e.into()),
        None => Err("no answer".into()),
    }
}
