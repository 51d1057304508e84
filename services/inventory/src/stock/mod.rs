//! The use cases. Each is one transaction that locks the product's row first, changes the stock by compare-and-set and
//! enqueues its events: no committed change is without its event, and the events of a product come in commit order.
//!
//! None talks to a broker: that is the relay's, later.

mod end;
mod reserve;
mod restock;

use std::time::Duration;

use pillarbox::Outbox;
use pillarbox_contracts::{
    MAX_STOCK, ProductId, Quantity,
    http::{Availability, NewProduct, ProductStock},
};
use pillarbox_host::{Error, Result, Transaction, Transactions};
use time::OffsetDateTime;

pub use end::release_held;

use crate::repository::{Product, Repository, repository};

/// The use cases of the inventory service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stock {
    transactions: Transactions,
    outbox: Outbox,
    hold: Duration,
}

impl Stock {
    /// On the outbox's database; reservations are held for `hold`.
    ///
    /// # Errors
    /// See [`Transactions::new`].
    pub fn new(outbox: Outbox, hold: Duration) -> Result<Self> {
        Ok(Self {
            transactions: Transactions::new(outbox.database())?,
            outbox,
            hold,
        })
    }

    /// Adds a product.
    ///
    /// # Errors
    /// [`Error::Conflict`] if there is one of that name.
    pub async fn add_product(&self, new: &NewProduct) -> Result<ProductStock> {
        at_most(new.quantity)?;
        let mut tx = self.transactions.begin().await?;
        let added = stock(&mut tx)
            .add_product(&new.product_id, new.quantity)
            .await?;
        if !added {
            let id = &new.product_id;
            return Err(Error::Conflict(format!("product {id} is there already")));
        }
        tx.commit(&self.outbox).await?;
        let product = Product {
            id: new.product_id.clone(),
            quantity: new.quantity,
            held: 0,
        };
        Ok(product.into())
    }

    /// Looks at a product.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn product(&self, id: &ProductId) -> Result<ProductStock> {
        let mut reading = self.transactions.read().await?;
        let product = repository(reading.connection()).product(id).await?;
        product.map(Into::into).ok_or_else(|| unknown(id))
    }

    /// Whether so much could be reserved now: advice, no promise.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn availability(&self, id: &ProductId, quantity: Quantity) -> Result<Availability> {
        let product = self.product(id).await?;
        Ok(Availability {
            product_id: product.product_id,
            quantity,
            available: product.available,
            sufficient: product.available >= quantity.into(),
        })
    }
}

fn stock(tx: &mut Transaction) -> &mut dyn Repository {
    repository(tx.connection())
}

/// Changes the stock of a product whose row this transaction has locked.
async fn change(repository: &mut dyn Repository, was: &Product, now: &Product) -> Result<()> {
    if repository.change_stock(was, now).await? {
        return Ok(());
    }
    // Behind the lock this cannot be; if it is, nothing may be built on it.
    let text = format!("the stock of {} changed under its lock", was.id);
    let error = pillarbox::Error::new(pillarbox::Kind::Database, "change stock", text);
    Err(Error::Engine(error))
}

fn unknown(id: &ProductId) -> Error {
    Error::NotFound(format!("there is no product {id}"))
}

fn at_most(quantity: u64) -> Result<()> {
    if quantity <= MAX_STOCK {
        return Ok(());
    }
    let text = format!("a stock holds at most {MAX_STOCK} of a product; this would be {quantity}");
    Err(Error::Invalid(text))
}

/// Now, as exactly as both databases can store it.
pub(crate) fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc().truncate_to_microsecond()
}
