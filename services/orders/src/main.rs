//! The orders service as a process of its own.

use std::process::ExitCode;

use pillarbox_host::{Exclusive, Fatal, Listening, connect, program, run};
use pillarbox_orders::{OrdersService, SECTION};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    program("The orders service of the example shop", serve).await
}

async fn serve(config: pillarbox::Config, stop: CancellationToken) -> Result<(), Fatal> {
    let settings = config.at(SECTION)?;
    let own = settings.host()?;
    let transport = connect(&settings).await?;
    let service = OrdersService::open(settings, own, transport, &stop).await?;
    let listening = Listening::of(&*service).await?;
    run(vec![(service, listening)], Exclusive::No, stop).await
}
