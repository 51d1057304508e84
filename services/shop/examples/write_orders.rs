//! Writes `orders.csv` and `products.csv`, the same each time: `cargo run -p pillarbox-shop --example write_orders`.
//!
//! 2,400 orders over 50 products. Demand is unequal as in a real shop: the product of rank n is asked for 1/n as often as
//! the first. The eight most wanted have less stock than is asked for and run out, some get a restock. One order in fifty
//! asks for a product that does not exist. The last product has one piece, which is sold: that runs out twice, once when
//! nothing is available and once when nothing is left.

use std::{fmt::Write as _, fs, io, path::Path};

const PRODUCTS: usize = 50;
const ORDERS: usize = 2_400;
const USERS: u64 = 120;
const SCARCE: usize = 8;
const RESTOCKED: usize = 4;

fn main() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (orders, demand) = orders();
    fs::write(folder.join("orders.csv"), orders)?;
    fs::write(folder.join("products.csv"), products(&demand))
}

fn orders() -> (String, Vec<u64>) {
    let mut random = Random(20_261_124);
    let mut text = "user_id,product_id,quantity,then\n".to_owned();
    let mut demand = vec![0; PRODUCTS];
    for _ in 0..ORDERS {
        let user = 1 + random.below(USERS);
        let quantity = [1, 1, 1, 1, 1, 2, 2, 3, 3, 5][random.below(10) as usize];
        let then = ["keep", "keep", "confirm", "confirm", "cancel"][random.below(5) as usize];
        let (product, quantity, then) = match random.rank() {
            _ if random.below(50) == 0 => {
                (format!("gone-{:02}", 1 + random.below(9)), quantity, "keep")
            }
            rank if rank == PRODUCTS - 1 => (name(rank), 1, "confirm"),
            rank => {
                demand[rank] += quantity;
                (name(rank), quantity, then)
            }
        };
        let _ = writeln!(text, "{},{product},{quantity},{then}", user_id(user));
    }
    (text, demand)
}

fn products(demand: &[u64]) -> String {
    let mut text = "product_id,quantity,restock\n".to_owned();
    for (rank, wanted) in demand.iter().enumerate() {
        let quantity = match rank {
            _ if rank == PRODUCTS - 1 => 1,
            _ if rank < SCARCE => wanted * 2 / 5,
            _ => wanted + 20,
        };
        let restock = if rank < RESTOCKED { wanted / 10 } else { 0 };
        let _ = writeln!(text, "{},{quantity},{restock}", name(rank));
    }
    text
}

fn name(rank: usize) -> String {
    format!("sku-{:02}", rank + 1)
}

fn user_id(user: u64) -> String {
    format!("5f0c7f4e-8f4e-4a57-8a43-{user:012x}")
}

/// SplitMix64: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A product's rank, the first most likely.
    fn rank(&mut self) -> usize {
        let weights = || (1..=PRODUCTS as u64).map(|n| 1_000_000 / n);
        let mut at = self.below(weights().sum());
        for (rank, weight) in weights().enumerate() {
            match at.checked_sub(weight) {
                Some(rest) => at = rest,
                None => return rank,
            }
        }
        PRODUCTS - 1
    }
}
