use std::{io, time::Duration};

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How long a stop waits for requests under way beyond their own time-out.
const GRACE: Duration = Duration::from_secs(2);

/// Serves until `stop`, then finishes the requests under way.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    timeout: Duration,
    stop: CancellationToken,
) -> io::Result<()> {
    let serving = axum::serve(listener, router)
        .with_graceful_shutdown(stop.clone().cancelled_owned())
        .into_future();
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(timeout + GRACE).await;
    };
    tokio::select! {
        served = serving => served,
        // A client that never reads its answer must not keep the service from stopping.
        () = overdue => Ok(()),
    }
}
