//! Both services in one process, each with its own database and addresses, as if they were two. On the `memory`
//! transport it is the only way to run them: its broker lives in the process.

use std::{process::ExitCode, sync::Arc};

use pillarbox::{Config, Kind, transport::Transport};
use pillarbox_host::{Exclusive, Fatal, Listening, Service, program, run};
use pillarbox_inventory::Inventory;
use pillarbox_orders::{OrdersService, OrdersSettings};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    program("Both services of the example shop in one process", serve).await
}

async fn serve(config: Config, stop: CancellationToken) -> Result<(), Fatal> {
    let of_inventory = config.at(pillarbox_inventory::SECTION)?;
    let of_orders = config.at(pillarbox_orders::SECTION)?;
    let own_of_inventory = of_inventory.host()?;
    let mut own_of_orders: OrdersSettings = of_orders.host()?;

    let transport = pillarbox::connect(&of_inventory.transport).await?;
    let other = pillarbox::connect(&of_orders.transport).await?;
    let exclusive = Exclusive::for_transport(&*transport);
    let other = one_broker(&transport, other, exclusive)?;

    let inventory = Inventory::open(of_inventory, own_of_inventory, transport, &stop).await?;
    let at_inventory = Listening::of(&*inventory).await?;
    // Its real address, whatever the configuration says of port and host.
    own_of_orders.inventory.url = Some(format!("http://{}", at_inventory.address()));
    let orders = OrdersService::open(of_orders, own_of_orders, other, &stop).await?;
    let at_orders = Listening::of(&*orders).await?;

    // Always in this order: two processes that wait for each other's databases would wait for ever.
    let services: Vec<(Arc<dyn Service>, Listening)> =
        vec![(inventory, at_inventory), (orders, at_orders)];
    run(services, exclusive, stop).await
}

/// A broker that lives in the process is one for both services; any other connects each of them by itself.
fn one_broker(
    inventory: &Arc<dyn Transport>,
    orders: Arc<dyn Transport>,
    exclusive: Exclusive,
) -> pillarbox::Result<Arc<dyn Transport>> {
    if exclusive != Exclusive::for_transport(&*orders) {
        let text =
            "the transport \"memory\" joins both services or none; configure it once, for both";
        return Err(pillarbox::Error::new(Kind::Configuration, "connect", text));
    }
    Ok(if exclusive == Exclusive::Yes {
        inventory.clone()
    } else {
        orders
    })
}
