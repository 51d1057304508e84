//! The customers: they place orders, try again where they get no answer, and confirm or cancel what they got.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use pillarbox_contracts::{
    ProductId, Quantity,
    http::{NewOrder, NewProduct, OrderStatus, Status},
};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde_json::json;
use tokio::{
    sync::{Mutex, mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use uuid::Uuid;

use crate::{Result, progress::Progress};

/// Orders that are being placed at a time.
const PLACING: usize = 16;
/// Orders that are being waited for, to be confirmed or cancelled.
const FOLLOWING: usize = 48;
/// A request's time-out: longer than the shop's own.
const TIMEOUT: Duration = Duration::from_secs(15);
/// The first wait before another try; it doubles up to the last.
const FIRST_WAIT: Duration = Duration::from_millis(20);
const LAST_WAIT: Duration = Duration::from_millis(500);
/// How long a customer waits for an order to be reserved or refused.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where the shop listens.
#[derive(Debug, Clone)]
pub(crate) struct Addresses {
    pub(crate) inventory: String,
    pub(crate) orders: String,
}

/// A line of `orders.csv`.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    new: NewOrder,
    then: Then,
}

/// What the customer does once the order is reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Keep,
    Confirm,
    Cancel,
}

/// A line of `products.csv`, for its first delivery.
pub(crate) struct Product(NewProduct);

/// A line of `products.csv`, for what comes later.
pub(crate) struct Restock(ProductId, Option<Quantity>);

/// Drives the shop. Clones share it.
#[derive(Clone)]
pub(crate) struct Driver {
    client: Client,
    at: watch::Receiver<Option<Addresses>>,
    open: watch::Sender<usize>,
    progress: Progress,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    again: AtomicUsize,
    placed_again: AtomicUsize,
    confirmed: AtomicUsize,
    cancelled: AtomicUsize,
    refused: AtomicUsize,
    left: AtomicUsize,
}

impl Driver {
    pub(crate) fn new(at: watch::Receiver<Option<Addresses>>, progress: Progress) -> Result<Self> {
        Ok(Self {
            client: Client::builder().timeout(TIMEOUT).build()?,
            at,
            open: watch::Sender::new(0),
            progress,
            counts: Arc::default(),
        })
    }

    pub(crate) async fn add_products(&self, products: &[Product]) -> Result<()> {
        for Product(product) in products {
            let request = |at: &Addresses| {
                self.client
                    .post(format!("{}/products", at.inventory))
                    .json(product)
            };
            let added = self.until_answered(request, &self.counts.again).await?;
            // It may have been added by a try whose answer was lost.
            expect(&added, &[StatusCode::CREATED, StatusCode::CONFLICT])?;
        }
        Ok(())
    }

    pub(crate) async fn restock(&self, restocks: &[Restock]) -> Result<()> {
        for Restock(product, quantity) in restocks {
            let Some(quantity) = quantity else { continue };
            let body = json!({ "quantity": quantity });
            let request = |at: &Addresses| {
                let url = format!("{}/products/{product}/restock", at.inventory);
                self.client.post(url).json(&body)
            };
            let done = self.until_answered(request, &self.counts.again).await?;
            expect(&done, &[StatusCode::OK])?;
        }
        Ok(())
    }

    /// Lets customers in: so many in all.
    pub(crate) fn let_in(&self, orders: usize) {
        self.open.send_replace(orders);
    }

    /// Places all orders, as far as customers are let in, and confirms or cancels those that are to be.
    pub(crate) async fn run(&self, orders: Vec<Order>, pace: u32) -> Result<()> {
        let orders = Arc::new(Mutex::new(orders.into_iter().enumerate()));
        let (followed, to_follow) = mpsc::unbounded_channel();
        let to_follow = Arc::new(Mutex::new(to_follow));
        let mut pace = tokio::time::interval(Duration::from_secs(1) / pace.max(1));
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let pace = Arc::new(Mutex::new(pace));
        let mut tasks = JoinSet::<Result<()>>::new();
        for _ in 0..PLACING {
            let (driver, orders, followed) = (self.clone(), orders.clone(), followed.clone());
            let pace = pace.clone();
            tasks.spawn(async move {
                let mut open = driver.open.subscribe();
                loop {
                    let Some((number, order)) = orders.lock().await.next() else {
                        return Ok(());
                    };
                    open.wait_for(|open| number < *open).await?;
                    pace.lock().await.tick().await;
                    let id = driver.place(&order.new).await?;
                    if order.then != Then::Keep {
                        followed.send((id, order.then))?;
                    }
                }
            });
        }
        drop(followed);
        for _ in 0..FOLLOWING {
            let (driver, to_follow) = (self.clone(), to_follow.clone());
            tasks.spawn(async move {
                loop {
                    let Some((id, then)) = to_follow.lock().await.recv().await else {
                        return Ok(());
                    };
                    driver.follow(id, then).await?;
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    }

    async fn place(&self, new: &NewOrder) -> Result<Uuid> {
        let request = |at: &Addresses| self.client.post(format!("{}/orders", at.orders)).json(new);
        // A customer without an answer orders again, and may have ordered twice then: that is two orders.
        let placed = self
            .until_answered(request, &self.counts.placed_again)
            .await?;
        expect(&placed, &[StatusCode::CREATED])?;
        let placed: OrderStatus = match placed.json().await {
            Ok(placed) => placed,
            Err(_) => {
                self.counts.placed_again.fetch_add(1, Ordering::Relaxed);
                return Box::pin(self.place(new)).await;
            }
        };
        self.progress.advance();
        Ok(placed.order_id)
    }

    /// Waits until an order is reserved or refused; then confirms or cancels it.
    async fn follow(&self, id: Uuid, then: Then) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let mut wait = FIRST_WAIT;
        while Instant::now() < until {
            match (self.status(id).await?, then) {
                (Status::Failed, _) => return count(&self.counts.refused),
                (Status::Confirmed, _) => return count(&self.counts.confirmed),
                (Status::Cancelled, _) => return count(&self.counts.cancelled),
                (Status::Pending, _) => {}
                (_, Then::Confirm) => self.wish(id, "confirm").await?,
                (_, Then::Cancel) => self.wish(id, "cancel").await?,
                (_, Then::Keep) => return Ok(()),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LAST_WAIT);
        }
        count(&self.counts.left)
    }

    async fn status(&self, id: Uuid) -> Result<Status> {
        let request = |at: &Addresses| self.client.get(format!("{}/orders/{id}", at.orders));
        let view = self.until_answered(request, &self.counts.again).await?;
        expect(&view, &[StatusCode::OK])?;
        // Cut in the middle: the next look will tell.
        let view: Result<OrderStatus, _> = view.json().await;
        Ok(view.map_or(Status::Pending, |view| view.status))
    }

    async fn wish(&self, id: Uuid, what: &str) -> Result<()> {
        let request = |at: &Addresses| {
            self.client
                .post(format!("{}/orders/{id}/{what}", at.orders))
        };
        let done = self.until_answered(request, &self.counts.again).await?;
        // 202: on its way. 409: the other end came first, which the next look shows.
        expect(
            &done,
            &[StatusCode::OK, StatusCode::ACCEPTED, StatusCode::CONFLICT],
        )
    }

    /// Sends a request until there is an answer that is no failure of the server; counts tries that may have been
    /// carried out although they were not answered.
    async fn until_answered(
        &self,
        request: impl Fn(&Addresses) -> RequestBuilder,
        unanswered: &AtomicUsize,
    ) -> Result<Response> {
        let mut at = self.at.clone();
        let mut wait = FIRST_WAIT;
        loop {
            let addresses = at.wait_for(Option::is_some).await?.clone();
            let Some(addresses) = addresses else { continue };
            match request(&addresses).send().await {
                Ok(response) if !response.status().is_server_error() => return Ok(response),
                Err(e) if e.is_connect() => {}
                _ => drop(unanswered.fetch_add(1, Ordering::Relaxed)),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LAST_WAIT);
        }
    }

    /// What the customers saw.
    pub(crate) fn summary(&self) -> String {
        let read = |n: &AtomicUsize| n.load(Ordering::Relaxed);
        let c = &self.counts;
        format!(
            "customers  confirmed {}   cancelled {}   refused {}   gave up waiting {}\n           \
             without an answer: {} orders placed again, {} other requests sent again",
            read(&c.confirmed),
            read(&c.cancelled),
            read(&c.refused),
            read(&c.left),
            read(&c.placed_again),
            read(&c.again),
        )
    }
}

fn count(of: &AtomicUsize) -> Result<()> {
    of.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

fn expect(response: &Response, wanted: &[StatusCode]) -> Result<()> {
    let status = response.status();
    if wanted.contains(&status) {
        return Ok(());
    }
    Err(format!("{} answered {status}", response.url()).into())
}

impl FromStr for Order {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let [user, product, quantity, then] = cells(line)?;
        Ok(Self {
            new: NewOrder {
                user_id: user.parse().map_err(|e| format!("{user:?}: {e}"))?,
                product_id: product.parse()?,
                quantity: some_of(quantity)?.ok_or("the quantity is 0")?,
            },
            then: match then {
                "keep" => Then::Keep,
                "confirm" => Then::Confirm,
                "cancel" => Then::Cancel,
                other => return Err(format!("{other:?} is neither keep, confirm nor cancel")),
            },
        })
    }
}

impl FromStr for Product {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let [product, quantity, _] = cells(line)?;
        Ok(Self(NewProduct {
            product_id: product.parse()?,
            quantity: quantity.parse().map_err(|e| format!("{quantity:?}: {e}"))?,
        }))
    }
}

impl FromStr for Restock {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let [product, _, restock] = cells(line)?;
        Ok(Self(product.parse()?, some_of(restock)?))
    }
}

/// None for 0.
fn some_of(text: &str) -> Result<Option<Quantity>, String> {
    let number: u32 = text.parse().map_err(|e| format!("{text:?}: {e}"))?;
    Ok(Quantity::new(number))
}

fn cells<const N: usize>(line: &str) -> Result<[&str; N], String> {
    let cells: Vec<&str> = line.split(',').collect();
    cells.try_into().map_err(|_| format!("{N} cells expected"))
}
