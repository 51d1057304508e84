//! Whether the shop kept its promises, by plain SQL over both databases. Knows nothing of the engine: it reads the log
//! tables, the services' tables and the cursors as anybody could, and counts.
//!
//! Exits with 1 when a promise is broken, with 2 when it cannot look.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;

#[path = "check/look.rs"]
mod look;

use look::{Database, count, expected, pair, products};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Checks both databases of the shop: nothing lost, nothing twice, no stock out of thin air.
#[derive(Parser)]
struct Options {
    /// The inventory service's database: sqlite:… or postgres:…
    #[arg(long)]
    inventory: String,
    /// The orders service's database.
    #[arg(long)]
    orders: String,
    /// The stock there was at first: lines of product_id,quantity,…
    #[arg(long)]
    products: Option<std::path::PathBuf>,
    /// A time without the shop, in milliseconds since 1970: FROM..TO. One line of latencies leaves out the events of that
    /// time, and of the time after it until everything is applied that had piled up.
    #[arg(long = "restart", value_parser = interval)]
    restarts: Vec<(i64, i64)>,
    /// Look again for so many seconds until everything is applied.
    #[arg(long, default_value_t = 0)]
    wait: u64,
    /// Print nothing but what is broken.
    #[arg(long)]
    quiet: bool,
}

fn interval(text: &str) -> Result<(i64, i64)> {
    let (from, to) = text.split_once("..").ok_or("expected FROM..TO")?;
    Ok((from.parse()?, to.parse()?))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match check(&Options::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "check: {e}");
            ExitCode::from(2)
        }
    }
}

async fn check(options: &Options) -> Result<bool> {
    let inventory = Database::open(&options.inventory).await?;
    let orders = Database::open(&options.orders).await?;
    let until = Instant::now() + Duration::from_secs(options.wait);
    loop {
        let facts = Facts::gather(&inventory, &orders, options).await?;
        if !facts.is_settled() && Instant::now() < until {
            // Nothing tells a stranger when another program is done.
            tokio::time::sleep(Duration::from_millis(250)).await;
            continue;
        }
        let mut out = std::io::stdout().lock();
        if !options.quiet {
            facts.print(&mut out, options)?;
        }
        for broken in facts.broken() {
            writeln!(out, "BROKEN  {broken}")?;
        }
        return Ok(facts.broken().is_empty());
    }
}

/// One direction: the log of one service, the effects in the database of the other.
struct Flow {
    name: &'static str,
    committed: BTreeMap<String, usize>,
    published: usize,
    handled: usize,
    applied: usize,
    lost: Vec<String>,
    duplicated: Vec<String>,
    /// Effects of events that are in no log.
    unheard: Vec<String>,
    /// (committed at, effect at), microseconds
    times: Vec<(i64, i64)>,
}

struct Product {
    id: String,
    initial: i64,
    restocked: i64,
    quantity: i64,
    held: i64,
    reserved: i64,
    sold: i64,
}

struct Facts {
    flows: [Flow; 2],
    products: Vec<Product>,
    expected: Option<HashMap<String, i64>>,
    reservations: Vec<(String, String)>,
    restocks: usize,
    orders: HashMap<String, String>,
    waiting: usize,
    dead: usize,
}

impl Facts {
    async fn gather(inventory: &Database, orders: &Database, options: &Options) -> Result<Self> {
        // Effects before logs: an event that is committed meanwhile must not look like an effect without one.
        let of_orders = orders.rows(&look::EFFECTS_OF_ORDERS).await?;
        let of_inventory = inventory.rows(&look::EFFECTS_OF_INVENTORY).await?;
        let published = [
            count(inventory, &look::PUBLISHED).await?,
            count(orders, &look::PUBLISHED).await?,
        ];
        let flows = [
            Flow::new(
                "inventory",
                &look::INVENTORY_TYPES,
                inventory.rows(&look::LOG).await?,
                published[0],
                of_orders,
            )?,
            Flow::new(
                "orders",
                &look::ORDERS_TYPES,
                orders.rows(&look::LOG).await?,
                published[1],
                of_inventory,
            )?,
        ];
        let pairs = |rows: Vec<Vec<String>>| rows.into_iter().filter_map(|row| pair(row).ok());
        Ok(Self {
            flows,
            products: products(inventory.rows(&look::STOCK).await?)?,
            expected: options.products.as_deref().map(expected).transpose()?,
            reservations: pairs(inventory.rows(&look::RESERVATIONS).await?).collect(),
            restocks: count(inventory, &look::RESTOCKS).await?,
            orders: pairs(orders.rows(&look::ORDERS).await?).collect(),
            waiting: count(inventory, &look::WAITING).await?
                + count(orders, &look::WAITING).await?,
            dead: count(inventory, &look::DEAD).await? + count(orders, &look::DEAD).await?,
        })
    }

    fn is_settled(&self) -> bool {
        self.waiting == 0
            && self
                .flows
                .iter()
                .all(|f| f.lost.is_empty() && f.published == f.committed())
    }

    /// Every promise that is not kept, as a sentence.
    fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        for flow in &self.flows {
            flow.broken(&mut broken);
        }
        self.stock_broken(&mut broken);
        self.changes_without_events(&mut broken);
        self.sides_disagree(&mut broken);
        broken
    }

    fn stock_broken(&self, broken: &mut Vec<String>) {
        for p in &self.products {
            if p.quantity < 0 || p.held < 0 || p.quantity < p.held {
                broken.push(format!(
                    "{}: stock below zero: quantity {}, held {}",
                    p.id, p.quantity, p.held
                ));
            }
            if p.quantity + p.sold != p.initial + p.restocked {
                broken.push(format!(
                    "{}: quantity {} and sold {} are not initial {} and restocked {}",
                    p.id, p.quantity, p.sold, p.initial, p.restocked
                ));
            }
            if p.held != p.reserved {
                broken.push(format!(
                    "{}: {} are held, but reservations hold {}",
                    p.id, p.held, p.reserved
                ));
            }
        }
        let Some(expected) = &self.expected else {
            return;
        };
        let found: HashMap<_, _> = self.products.iter().map(|p| (&p.id, p.initial)).collect();
        for (id, quantity) in expected {
            if found.get(id) != Some(quantity) {
                broken.push(format!(
                    "{id}: began with {:?}, not with {quantity}",
                    found.get(id)
                ));
            }
        }
    }

    /// Each change has its event, and no event is without its change.
    fn changes_without_events(&self, broken: &mut Vec<String>) {
        let ended = |state| self.reservations.iter().filter(|(_, s)| s == state).count();
        let [inventory, orders] = &self.flows;
        let pairs = [
            (
                "reservations",
                self.reservations.len(),
                inventory,
                "inventory.stock.reserved",
            ),
            (
                "confirmed reservations",
                ended("confirmed"),
                inventory,
                "inventory.stock.confirmed",
            ),
            (
                "released reservations",
                ended("released"),
                inventory,
                "inventory.stock.released",
            ),
            (
                "restocks",
                self.restocks,
                inventory,
                "inventory.stock.replenished",
            ),
            ("orders", self.orders.len(), orders, "orders.order.created"),
            (
                "confirmed orders",
                self.in_status("confirmed"),
                orders,
                "orders.order.confirmed",
            ),
        ];
        for (what, rows, flow, kind) in pairs {
            let events = flow.committed.get(kind).copied().unwrap_or(0);
            if rows != events {
                broken.push(format!("{rows} {what}, but {events} events {kind}"));
            }
        }
    }

    /// What one service holds or has sold is what the other believes. Only once everything is applied.
    fn sides_disagree(&self, broken: &mut Vec<String>) {
        if !self.is_settled() {
            return;
        }
        for (order, state) in &self.reservations {
            let status = self.orders.get(order).map(String::as_str);
            let ended = matches!(status, Some("failed" | "cancelled"));
            if state == "held" && ended {
                broken.push(format!("order {order} has ended, but stock is held for it"));
            }
            if state == "confirmed" && status != Some("confirmed") {
                broken.push(format!(
                    "order {order} is {status:?}, but its stock was sold"
                ));
            }
        }
        let confirmed = self.reservations.iter().filter(|(_, s)| s == "confirmed");
        let sold: HashSet<&String> = confirmed.map(|(order, _)| order).collect();
        for (order, status) in &self.orders {
            if status == "confirmed" && !sold.contains(order) {
                broken.push(format!("order {order} is confirmed, but nothing was sold"));
            }
        }
    }

    fn in_status(&self, status: &str) -> usize {
        self.orders.values().filter(|s| *s == status).count()
    }

    fn print(&self, out: &mut impl std::io::Write, options: &Options) -> std::io::Result<()> {
        let [inventory, _] = &self.flows;
        let events = |kind: &str| inventory.committed.get(kind).copied().unwrap_or(0);
        writeln!(
            out,
            "orders     placed {}   reserved {}   refused {}   depleted {}   restocked {}",
            self.orders.len(),
            events("inventory.stock.reserved"),
            events("inventory.stock.failed"),
            events("inventory.stock.depleted"),
            events("inventory.stock.replenished"),
        )?;
        let open = ["pending", "confirming", "cancelling"]
            .map(|s| self.in_status(s))
            .iter()
            .sum::<usize>();
        writeln!(
            out,
            "           now: reserved {}   confirmed {}   failed {}   cancelled {}   open {open}",
            self.in_status("reserved"),
            self.in_status("confirmed"),
            self.in_status("failed"),
            self.in_status("cancelled"),
        )?;
        writeln!(
            out,
            "\nevents of    committed   published   to apply    applied       lost    doubled"
        )?;
        for flow in &self.flows {
            flow.print(out)?;
        }
        writeln!(out, "           dead letters {}", self.dead)?;
        let below = |p: &&Product| p.quantity < 0 || p.held < 0 || p.quantity < p.held;
        writeln!(
            out,
            "\nstock      products {}   pieces {}   held {}   sold {}   below zero {}",
            self.products.len(),
            self.products.iter().map(|p| p.quantity).sum::<i64>(),
            self.products.iter().map(|p| p.held).sum::<i64>(),
            self.products.iter().map(|p| p.sold).sum::<i64>(),
            self.products.iter().filter(below).count(),
        )?;
        self.print_latencies(out, options)
    }

    fn print_latencies(
        &self,
        out: &mut impl std::io::Write,
        options: &Options,
    ) -> std::io::Result<()> {
        let [inventory, orders] = &self.flows;
        let all: Vec<_> = inventory
            .times
            .iter()
            .chain(&orders.times)
            .copied()
            .collect();
        writeln!(
            out,
            "\ncommit to effect          events        p50        p99        max"
        )?;
        latency(out, "all", &all)?;
        if !options.restarts.is_empty() {
            let restarts: Vec<_> = options
                .restarts
                .iter()
                .map(|r| caught_up(*r, &all))
                .collect();
            let calm =
                |event: &(i64, i64)| !restarts.iter().any(|r| r.0 <= event.1 && r.1 >= event.0);
            let calm: Vec<_> = all.iter().copied().filter(calm).collect();
            latency(out, "without restarts", &calm)?;
        }
        Ok(())
    }
}

impl Flow {
    fn new(
        name: &'static str,
        types: &[&str],
        log: Vec<Vec<String>>,
        published: usize,
        effects: Vec<Vec<String>>,
    ) -> Result<Self> {
        let mut applied = HashMap::<String, Vec<i64>>::new();
        for effect in effects {
            let (id, at) = pair(effect)?;
            applied.entry(id).or_default().push(at.parse()?);
        }
        let mut flow = Self {
            name,
            committed: BTreeMap::new(),
            published,
            handled: 0,
            applied: 0,
            lost: Vec::new(),
            duplicated: Vec::new(),
            unheard: Vec::new(),
            times: Vec::new(),
        };
        for event in log {
            let [id, kind, at] =
                <[String; 3]>::try_from(event).map_err(|_| "three columns expected")?;
            let effects = applied.remove(&id);
            let is_handled = types.contains(&kind.as_str());
            *flow.committed.entry(kind).or_default() += 1;
            if !is_handled {
                flow.unheard.extend(effects.map(|_| id));
                continue;
            }
            flow.handled += 1;
            match effects.as_deref() {
                None => flow.lost.push(id),
                Some(times) => {
                    flow.applied += 1;
                    flow.times.extend(
                        times
                            .first()
                            .map(|effect| Ok::<_, std::num::ParseIntError>((at.parse()?, *effect)))
                            .transpose()?,
                    );
                    if times.len() > 1 {
                        flow.duplicated.push(id);
                    }
                }
            }
        }
        flow.unheard.extend(applied.into_keys());
        Ok(flow)
    }

    fn committed(&self) -> usize {
        self.committed.values().sum()
    }

    fn broken(&self, broken: &mut Vec<String>) {
        let kinds = [
            ("lost: committed, but without effect", &self.lost),
            ("applied more than once", &self.duplicated),
            ("applied, but never committed", &self.unheard),
        ];
        for (what, ids) in kinds.into_iter().filter(|(_, ids)| !ids.is_empty()) {
            let some: Vec<&str> = ids.iter().take(3).map(String::as_str).collect();
            broken.push(format!(
                "{} events of {} {what}: {}",
                ids.len(),
                self.name,
                some.join(", ")
            ));
        }
    }

    fn print(&self, out: &mut impl std::io::Write) -> std::io::Result<()> {
        writeln!(
            out,
            "{:<10} {:>11} {:>11} {:>10} {:>10} {:>10} {:>10}",
            self.name,
            self.committed(),
            self.published,
            self.handled,
            self.applied,
            self.lost.len(),
            self.duplicated.len()
        )
    }
}

/// A restart, in microseconds, with the time until everything was applied that had been committed by its end.
fn caught_up((from, to): (i64, i64), events: &[(i64, i64)]) -> (i64, i64) {
    let (from, to) = (from * 1_000, to * 1_000);
    let waiting = events.iter().filter(|(committed, _)| *committed <= to);
    (
        from,
        waiting.map(|(_, applied)| *applied).fold(to, i64::max),
    )
}

fn latency(out: &mut impl std::io::Write, name: &str, times: &[(i64, i64)]) -> std::io::Result<()> {
    let mut waits: Vec<i64> = times.iter().map(|(from, to)| (to - from).max(0)).collect();
    waits.sort_unstable();
    let at =
        |share: usize| waits.get((waits.len() * share / 100).min(waits.len().saturating_sub(1)));
    let shown = |wait: Option<&i64>| wait.map_or("-".to_owned(), |us| format!("{} ms", us / 1_000));
    writeln!(
        out,
        "{name:<20} {:>11} {:>10} {:>10} {:>10}",
        waits.len(),
        shown(at(50)),
        shown(at(99)),
        shown(waits.last())
    )
}
