//! What an operator does with events that were given up: look, see what a retry would mean, retry gently, discard.
//!
//! ```text
//! DATABASE_URL=postgres://… cargo run --example dead_letters -- billing "no such account"
//! ```

#![allow(clippy::print_stdout)]

use pillarbox::{
    Admin, Kind,
    admin::{Ended, Filter, Pace, Page},
};
use sqlx::PgPool;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let group = arguments.next().ok_or("which group?")?;
    let filter = Filter {
        reason: arguments.next(),
        ..Filter::of_group(group)
    };
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    pillarbox::migrate(&pool).await?;
    let operator = std::env::var("USER").unwrap_or_else(|_| "nobody".to_owned());
    let admin = Admin::new(&pool, operator);

    let letters = admin.dead_letters(&filter, &Page::default()).await?;
    for letter in &letters {
        println!(
            "{} {} {:?}: {}",
            letter.id, letter.kind, letter.key, letter.reason
        );
    }
    for head in admin.parked(&filter, &Page::default()).await? {
        println!(
            "the key {:?} of {} waits behind {}",
            head.key, head.topic, head.id
        );
    }

    let dry = admin.dry_run(&filter).await?;
    println!("{} letters of {} keys", dry.letters, dry.keys);
    if let Some(newest) = letters.first() {
        // One alone, to see whether the cause is mended.
        match admin.retry(&newest.id, "the account is there now").await {
            Ok(is_new) => println!(
                "{}: {}",
                newest.id,
                if is_new { "goes on" } else { "waits" }
            ),
            Err(e) if e.kind() == Kind::NotFound => println!("somebody was faster: {e}"),
            Err(e) => return Err(e.into()),
        }
    }
    let pace = Pace {
        per_second: 20.0,
        ..Pace::default()
    };
    let done = admin
        .retry_all(&filter, &pace, "the account is there now")
        .await?;
    println!("{} went on; {} cannot be read", done.done, done.unreadable);
    if done.ended != Ended::Complete {
        println!("not all: {:?}; run this again later", done.ended);
    }
    Ok(())
}
