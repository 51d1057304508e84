//! Each fault is seen from both sides, over loopback.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// A client, a server and the proxy between them. No wait of a test may last for ever.
struct Pair {
    proxy: Proxy,
    listener: TcpListener,
    client: TcpStream,
    server: TcpStream,
}

async fn pair() -> Pair {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap().to_string())
        .await
        .unwrap();
    let client = TcpStream::connect(proxy.addr()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    proxy.wait_for_connections(1).await;
    Pair {
        proxy,
        listener,
        client,
        server,
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future)
        .await
        .expect("nothing happened")
}

async fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    within(stream.read_exact(&mut bytes)).await.unwrap();
    bytes
}

/// All that arrives until the end, and how that end looked.
async fn rest(stream: &mut TcpStream) -> (Vec<u8>, Option<io::ErrorKind>) {
    let mut bytes = Vec::new();
    let end = within(stream.read_to_end(&mut bytes)).await;
    (bytes, end.err().map(|error| error.kind()))
}

/// That nothing arrives. The only proof there is takes time.
async fn silent(stream: &mut TcpStream) {
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut byte)).await;
    assert!(read.is_err(), "something arrived: {read:?}");
}

const REFUSED: io::ErrorKind = io::ErrorKind::ConnectionRefused;
const RESET: Option<io::ErrorKind> = Some(io::ErrorKind::ConnectionReset);

#[tokio::test]
async fn bytes_and_half_closes_pass_both_ways() {
    let Pair {
        proxy,
        listener: _listener,
        mut client,
        mut server,
    } = pair().await;
    let big: Vec<u8> = (0..1_000_000_u32).map(|number| number as u8).collect();
    let sent = big.clone();
    let upload = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        client
    });
    let (received, end) = rest(&mut server).await;
    assert!(received == big && end.is_none());
    let mut client = within(upload).await.unwrap();

    server.write_all(b"answer").await.unwrap();
    drop(server);
    assert_eq!(rest(&mut client).await, (b"answer".to_vec(), None));
    within(proxy.wait_until_closed()).await;
    let counters = proxy.counters();
    assert_eq!((counters.to_server, counters.to_client), (1_000_000, 6));
    assert_eq!((counters.connections, counters.open), (1, 0));
}

#[tokio::test]
async fn cut_closes_and_reset_resets_both_sides_and_new_ones_are_taken() {
    for (reset, end) in [(false, None), (true, RESET)] {
        let Pair {
            proxy,
            listener,
            mut client,
            mut server,
        } = pair().await;
        if reset {
            proxy.reset()
        } else {
            proxy.cut()
        }
        assert_eq!(rest(&mut client).await, (vec![], end));
        assert_eq!(rest(&mut server).await, (vec![], end));

        let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
        let (mut server, _) = within(listener.accept()).await.unwrap();
        within(proxy.wait_for_connections(2)).await;
        client.write_all(b"again").await.unwrap();
        assert_eq!(read(&mut server, 5).await, b"again");
    }
}

#[tokio::test]
async fn a_black_hole_swallows_everything_until_it_heals() {
    let Pair {
        proxy,
        listener,
        mut client,
        mut server,
    } = pair().await;
    proxy.black_hole(true);
    client.write_all(b"up").await.unwrap();
    server.write_all(b"down").await.unwrap();
    let mut second = TcpStream::connect(proxy.addr()).await.unwrap();
    second.write_all(b"second").await.unwrap();
    tokio::join!(
        silent(&mut client),
        silent(&mut server),
        silent(&mut second)
    );
    assert_eq!(proxy.counters().connections, 1, "the server is not reached");
    client.shutdown().await.unwrap();
    silent(&mut server).await;

    proxy.black_hole(false);
    assert_eq!(
        rest(&mut server).await,
        (b"up".to_vec(), None),
        "the end came through too"
    );
    assert_eq!(read(&mut client, 4).await, b"down");
    let (mut server, _) = within(listener.accept()).await.unwrap();
    assert_eq!(read(&mut server, 6).await, b"second");
}

#[tokio::test]
async fn one_direction_is_held_and_the_other_goes_on() {
    let Pair {
        proxy,
        listener: _listener,
        mut client,
        mut server,
    } = pair().await;
    proxy.hold(Direction::ToClient);
    server.write_all(b"confirm").await.unwrap();
    client.write_all(b"publish").await.unwrap();
    assert_eq!(read(&mut server, 7).await, b"publish");
    silent(&mut client).await;
    proxy.release();
    assert_eq!(read(&mut client, 7).await, b"confirm");

    proxy.hold(Direction::ToClient);
    server.write_all(b"lost").await.unwrap();
    silent(&mut client).await;
    proxy.cut();
    assert_eq!(rest(&mut client).await, (vec![], None));
    assert_eq!(
        proxy.counters().to_client,
        7,
        "what was held when it was cut is gone"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_is_in_force_when_it_returns() {
    let Pair {
        proxy,
        listener: _listener,
        mut client,
        mut server,
    } = pair().await;
    let flood = tokio::spawn(async move { while client.write_all(&[7; 1000]).await.is_ok() {} });
    let drain =
        tokio::spawn(
            async move { while server.read(&mut [0; 1000]).await.is_ok_and(|n| n > 0) {} },
        );
    for _ in 0..200 {
        let seen = proxy.counters().to_server;
        within(proxy.wait_for(|counters| counters.to_server > seen + 10_000)).await;
        proxy.hold(Direction::ToServer);
        let held = proxy.counters().to_server;
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(proxy.counters().to_server, held);
        proxy.release();
    }
    drop(proxy);
    within(flood).await.unwrap();
    within(drain).await.unwrap();
}

#[tokio::test]
async fn a_connection_ends_in_the_middle_of_a_frame() {
    let Pair {
        proxy,
        listener: _listener,
        mut client,
        mut server,
    } = pair().await;
    proxy.cut_after_bytes(Direction::ToServer, 4);
    client.write_all(b"fr").await.unwrap();
    client.write_all(b"ame").await.unwrap();
    assert_eq!(rest(&mut server).await, (b"fram".to_vec(), None));
    assert_eq!(rest(&mut client).await, (vec![], None));

    let Pair {
        proxy,
        listener,
        mut client,
        mut server,
    } = pair().await;
    proxy.reset_after_bytes(Direction::ToClient, 3);
    server.write_all(b"frame").await.unwrap();
    let (received, end) = rest(&mut client).await;
    assert!(
        b"fra".starts_with(&received) && end == RESET,
        "{received:?} {end:?}"
    );
    assert_eq!(proxy.counters().to_client, 3);

    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    let (mut server, _) = within(listener.accept()).await.unwrap();
    server.write_all(b"whole frame").await.unwrap();
    assert_eq!(read(&mut client, 11).await, b"whole frame", "once only");
}

#[tokio::test]
async fn refusing_spares_what_stands_and_keeps_the_port() {
    let Pair {
        proxy,
        listener,
        mut client,
        mut server,
    } = pair().await;
    proxy.refuse(true);
    let refused = async {
        while TcpStream::connect(proxy.addr())
            .await
            .map_err(|error| error.kind())
            .err()
            != Some(REFUSED)
        {}
    };
    within(refused).await;
    client.write_all(b"still here").await.unwrap();
    assert_eq!(read(&mut server, 10).await, b"still here");

    proxy.refuse(false);
    let taken = async {
        loop {
            if let Ok(client) = TcpStream::connect(proxy.addr()).await {
                return client;
            }
            tokio::task::yield_now().await;
        }
    };
    let mut client = within(taken).await;
    let (mut server, _) = within(listener.accept()).await.unwrap();
    client.write_all(b"back").await.unwrap();
    assert_eq!(read(&mut server, 4).await, b"back");
}

#[tokio::test]
async fn a_server_that_is_down_looks_like_a_reset_and_may_come_back() {
    let Pair {
        proxy, listener, ..
    } = pair().await;
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    assert_eq!(rest(&mut client).await, (vec![], RESET));
    within(proxy.wait_for(|counters| counters.unreachable == 1)).await;

    let _listener = TcpListener::bind(address).await.unwrap();
    let _client = TcpStream::connect(proxy.addr()).await.unwrap();
    within(proxy.wait_for_connections(2)).await;
}

#[tokio::test]
async fn dropping_the_proxy_resets_what_went_through_it() {
    let Pair {
        proxy,
        listener: _listener,
        mut client,
        mut server,
    } = pair().await;
    let address = proxy.addr();
    drop(proxy);
    assert_eq!(rest(&mut client).await, (vec![], RESET));
    assert_eq!(rest(&mut server).await, (vec![], RESET));
    let refused = async {
        while TcpStream::connect(address)
            .await
            .map_err(|error| error.kind())
            .err()
            != Some(REFUSED)
        {}
    };
    within(refused).await;
}

#[tokio::test]
async fn a_url_leads_through_the_proxy() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!(
        "amqp://user:secret@{}/vhost",
        listener.local_addr().unwrap()
    );
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    assert_eq!(
        through,
        format!("amqp://user:secret@{}/vhost", proxy.addr())
    );
    assert!(Proxy::before("not a url").await.is_err());
}

#[tokio::test]
async fn the_server_has_the_last_words_and_the_client_no_answer() {
    let Pair {
        proxy,
        mut client,
        mut server,
        ..
    } = pair().await;
    proxy.cut_before_answer(b"COMMIT\0");
    client.write_all(b"READ COMMITTED\0").await.unwrap();
    assert_eq!(read(&mut server, 15).await, b"READ COMMITTED\0");
    assert!(proxy.awaits_text());
    client.write_all(b"then COMMIT\0").await.unwrap();
    assert_eq!(rest(&mut server).await, (b"then COMMIT\0".to_vec(), None));
    assert!(!proxy.awaits_text());
    assert_eq!(rest(&mut client).await.0, b"");
}
