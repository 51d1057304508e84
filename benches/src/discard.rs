//! A transport that takes everything and keeps nothing: what is left is the relay and its database.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::{FutureExt, future::BoxFuture};
use pillarbox::transport::{
    Binding, Error, Kind, Message, Outcome, Publisher, Result, Source, Subscription, Transport,
};

pub(crate) struct Discard;

#[async_trait]
impl Transport for Discard {
    fn kind(&self) -> &'static str {
        "discard"
    }
    async fn publisher(&self) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Self))
    }
    async fn bind(&self, _: &Binding) -> Result<Vec<Source>> {
        Ok(Vec::new())
    }
    async fn subscribe(
        &self,
        _: &Source,
        _: &str,
        _: Option<u64>,
    ) -> Result<Box<dyn Subscription>> {
        Err(Error::new(
            Kind::Configuration,
            "subscribe",
            "nothing was kept",
        ))
    }
    async fn dead_letters(&self, _: &str, _: &str) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Self))
    }
}

impl Publisher for Discard {
    fn publish(&self, messages: Vec<Arc<Message>>) -> BoxFuture<'static, Vec<Outcome>> {
        async move { messages.iter().map(|_| Outcome::Stored).collect() }.boxed()
    }
}
