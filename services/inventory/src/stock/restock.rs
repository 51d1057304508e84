use pillarbox_contracts::{ProductId, Quantity, StockReplenished, http::ProductStock};
use pillarbox_host::{Result, http::Correlation};

use super::{Stock, at_most, change, now, stock, unknown};
use crate::repository::Product;

impl Stock {
    /// Takes a restock in.
    ///
    /// # Errors
    /// [`NotFound`](pillarbox_host::Error::NotFound) for an unknown product; [`Invalid`](pillarbox_host::Error::Invalid)
    /// for more than a stock can hold.
    pub async fn restock(
        &self,
        id: &ProductId,
        quantity: Quantity,
        correlation: &Correlation,
    ) -> Result<ProductStock> {
        let outbox = correlation.on(&self.outbox);
        let mut tx = self.transactions.begin().await?;
        let was = stock(&mut tx).lock_product(id).await?;
        let was = was.ok_or_else(|| unknown(id))?;
        let product = Product {
            quantity: was.quantity + u64::from(quantity),
            ..was.clone()
        };
        at_most(product.quantity)?;
        change(stock(&mut tx), &was, &product).await?;
        stock(&mut tx).add_restock(id, quantity, now()).await?;
        let replenished = StockReplenished {
            product_id: id.clone(),
            quantity,
            available: product.available(),
        };
        outbox.enqueue(tx.connection(), &replenished).await?;
        tx.commit(&outbox).await?;
        Ok(product.into())
    }
}
