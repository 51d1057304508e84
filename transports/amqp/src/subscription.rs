//! Reading sessions: one queue, one channel, manual acknowledgement. Never rejects, never requeues, never cancels.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use pillarbox_transport::{Ack, Delivery, Error, Kind, Result, Subscription};

use crate::{connection::Live, outcome::kind, topology::short, wire};

/// An open reading session. Dropping it closes its channel.
pub(crate) struct Reader {
    consumer: Consumer,
    channel: Channel,
    live: Arc<Live>,
    topic: String,
    queue: String,
    limit: Duration,
}

impl Reader {
    /// Starts to read. The queue has been declared.
    pub(crate) async fn open(
        live: Arc<Live>,
        topic: &str,
        queue: &str,
        prefetch: u16,
        limit: Duration,
    ) -> Result<Self> {
        let channel = live.channel().await?;
        let qos = channel.basic_qos(prefetch, BasicQosOptions::default());
        live.answer("set the prefetch", qos).await?;
        let consume = channel.basic_consume(
            short(queue)?,
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let consumer = live.answer("consume", consume).await?;
        Ok(Self {
            consumer,
            channel,
            live,
            topic: topic.to_owned(),
            queue: queue.to_owned(),
            limit,
        })
    }
}

#[async_trait]
impl Subscription for Reader {
    async fn next(&mut self) -> Result<Delivery> {
        let mut delivery = match self.consumer.next().await {
            Some(Ok(delivery)) => delivery,
            Some(Err(e)) => {
                let kind = match kind(&e) {
                    // What was not acknowledged in time closes the channel under this code.
                    Kind::Configuration => Kind::Closed,
                    kind => kind,
                };
                return Err(Error::new(kind, "receive", format!("{:?}", self.queue)).caused_by(e));
            }
            // The broker's own cancel comes without a reason.
            None => {
                let text = format!(
                    "{:?}: the broker ended the session; the queue was deleted, or a message was not acknowledged in time",
                    self.queue
                );
                return Err(Error::new(Kind::Missing, "receive", text));
            }
        };
        let (message, defect) = wire::decode(&self.topic, &mut delivery);
        let (acker, limit) = (delivery.acker, self.limit);
        let ack = Ack::new(move || {
            Box::pin(async move {
                let told = tokio::time::timeout(limit, acker.ack(BasicAckOptions::default()));
                match told.await {
                    Ok(Ok(true)) => Ok(()),
                    Ok(Ok(false)) => {
                        let text = "its channel is closed: it will be delivered again";
                        Err(Error::new(Kind::Closed, "acknowledge", text))
                    }
                    Ok(Err(e)) => {
                        Err(
                            Error::new(Kind::Closed, "acknowledge", "its channel is closed")
                                .caused_by(e),
                        )
                    }
                    Err(_) => {
                        let text = format!("not written within {limit:?}");
                        Err(Error::new(Kind::Timeout, "acknowledge", text))
                    }
                }
            })
        });
        Ok(Delivery {
            message,
            position: None,
            defect,
            ack,
        })
    }

    /// Closes the channel, which puts what is unacknowledged back at its old places. A cancel would hand the queue to the
    /// next reader first, and these messages after.
    async fn close(self: Box<Self>) {
        let close = self.channel.close(200, "OK".into());
        if tokio::time::timeout(self.limit, close).await.is_err() {
            // The broker may still count this session as the reader: only the end of the connection ends that.
            self.live.cut();
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.channel.status().connected() {
            // Queues the close. Without it, dropping the consumer would cancel it.
            let _ = self.channel.close(200, "OK".into()).now_or_never();
        }
    }
}
