//! The test servers themselves: they start, restart, stand beside each other, and leave nothing behind.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::Duration;

use pillarbox_testkit::proxy::{Direction, Proxy};
use pillarbox_testkit::servers::{self, Nats, Postgres, RabbitMq, Shutdown};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, PgConnection};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

async fn connect(url: &str) -> PgConnection {
    PgConnectOptions::from_str(url)
        .unwrap()
        .connect()
        .await
        .unwrap()
}

async fn ask(connection: &mut PgConnection, sql: &str) -> String {
    sqlx::query_scalar(AssertSqlSafe(format!("SELECT ({sql})::text")))
        .fetch_one(connection)
        .await
        .unwrap()
}

async fn run(connection: &mut PgConnection, sql: &str) {
    sqlx::query(AssertSqlSafe(sql))
        .execute(connection)
        .await
        .unwrap();
}

/// Says the AMQP header to the broker at an `amqp://` address, and whether it answered.
async fn greets(url: &str) -> bool {
    let address = url
        .split('@')
        .nth(1)
        .and_then(|rest| rest.split('/').next())
        .unwrap();
    let Ok(mut stream) = TcpStream::connect(address).await else {
        return false;
    };
    stream.write_all(b"AMQP\0\0\x09\x01").await.unwrap();
    let mut frame = [0; 11];
    stream.read_exact(&mut frame).await.is_ok() && frame[7..] == [0, 10, 0, 10]
}

/// Whether the process is there and not merely uncollected.
fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| !rest.trim_start().starts_with('Z'))
    })
}

/// Waits for the end of foreign processes and folders, which send no signal.
async fn gone(pids: &[u32], folders: &[PathBuf]) {
    let wait = async {
        while pids.iter().any(|pid| alive(*pid)) || folders.iter().any(|folder| folder.exists()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let left = tokio::time::timeout(Duration::from_secs(30), wait).await;
    assert!(
        left.is_ok(),
        "still there: {:?} {folders:?}",
        pids.iter().filter(|pid| alive(**pid)).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn postgres_keeps_what_promises_rest_on() {
    let Some(server) = servers::required(servers::postgres().await) else {
        return;
    };
    let (one, two) = tokio::join!(server.create_database(), server.create_database());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_ne!(one, two);

    let mut connection = connect(&one).await;
    assert_eq!(
        ask(&mut connection, "current_setting('server_encoding')").await,
        "UTF8"
    );
    if server.pid().is_some() {
        for (setting, value) in [
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("synchronous_commit", "on"),
        ] {
            assert_eq!(
                ask(&mut connection, &format!("current_setting('{setting}')")).await,
                value,
                "{setting}"
            );
        }
        assert_eq!(
            ask(
                &mut connection,
                "current_setting('max_prepared_transactions')"
            )
            .await,
            "10"
        );
        assert_eq!(
            ask(&mut connection, "current_setting('listen_addresses')").await,
            "127.0.0.1"
        );
    }
    run(&mut connection, "CREATE TABLE here (id int)").await;
    let mut other = connect(&two).await;
    assert_eq!(
        ask(&mut other, "to_regclass('here') IS NULL").await,
        "true",
        "databases share nothing"
    );
}

#[tokio::test]
async fn postgres_survives_stops_crashes_and_company() {
    let (one, two) = tokio::join!(
        Postgres::start(),
        Postgres::start_with(&[("max_prepared_transactions", "0")])
    );
    let (Some(mut server), Some(other)) = (servers::required(one), servers::required(two)) else {
        return;
    };
    let url = server.create_database().await.unwrap();
    let mut connection = connect(&url).await;
    run(&mut connection, "CREATE TABLE kept (id int)").await;

    for how in [Shutdown::Fast, Shutdown::Immediate] {
        run(&mut connection, "INSERT INTO kept VALUES (1)").await;
        let before = server.pid();
        server.restart(how).await.unwrap();
        assert_ne!(server.pid(), before);
        connection = connect(&url).await;
    }
    run(&mut connection, "INSERT INTO kept VALUES (1)").await;
    let before = server.pid();
    server.kill_backend().await.unwrap();
    assert_eq!(server.pid(), before, "the postmaster stays");
    assert!(
        sqlx::query("SELECT 1")
            .execute(&mut connection)
            .await
            .is_err(),
        "every session was thrown out"
    );
    connection = connect(&url).await;
    assert_eq!(ask(&mut connection, "SELECT count(*) FROM kept").await, "3");

    server.stop(Shutdown::Fast).await.unwrap();
    server.stop(Shutdown::Fast).await.unwrap();
    assert_eq!(server.pid(), None);
    assert!(
        PgConnectOptions::from_str(&url)
            .unwrap()
            .connect()
            .await
            .is_err()
    );
    let mut neighbour = connect(&other.url("postgres")).await;
    assert_eq!(
        ask(
            &mut neighbour,
            "current_setting('max_prepared_transactions')"
        )
        .await,
        "0"
    );
    server.start_again().await.unwrap();
    connect(&url).await;

    let pids = [server.pid().unwrap(), other.pid().unwrap()];
    let folders =
        [&server, &other].map(|server| server.data_folder().unwrap().parent().unwrap().to_owned());
    server.end().await;
    assert!(
        !folders[0].exists() && !alive(pids[0]),
        "end() returns when nothing is left"
    );
    drop(other);
    gone(&pids, &folders).await;
}

#[tokio::test]
async fn a_setting_that_does_not_exist_is_a_failed_start_with_its_reason() {
    match Postgres::start_with(&[("no_such_setting", "1")]).await {
        Ok(_) => panic!("started"),
        Err(error) if error.is_missing() => {
            servers::required(Err::<(), _>(error));
        }
        Err(error) => assert!(error.to_string().contains("no_such_setting"), "{error}"),
    }
}

#[tokio::test]
async fn rabbitmq_gives_vhosts_and_obeys() {
    let Some(broker) = servers::required(servers::rabbitmq().await) else {
        return;
    };
    let (one, two) = tokio::join!(broker.create_vhost(), broker.create_vhost());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert!(greets(&one).await);
    if broker.environment().len() < 2 {
        return; // somebody else's broker: nothing more can be asked of it
    }
    assert_ne!(one, two);
    let vhost = one.rsplit('/').next().unwrap();
    let permissions = broker
        .ctl(&["list_permissions", "--vhost", vhost])
        .await
        .unwrap();
    assert!(
        permissions.contains("pillarbox\t.*\t.*\t.*"),
        "{permissions}"
    );
    let error = broker.ctl(&["no_such_command"]).await.unwrap_err();
    assert!(error.to_string().contains("no_such_command"), "{error}");
}

#[tokio::test]
async fn rabbitmq_survives_stops_crashes_and_company() {
    let (one, two) = tokio::join!(RabbitMq::start(), RabbitMq::start());
    let (Some(mut broker), Some(other)) = (servers::required(one), servers::required(two)) else {
        return;
    };
    let vhost = broker.create_vhost().await.unwrap();
    broker.restart().await.unwrap();
    assert!(greets(&vhost).await);

    broker.kill().await.unwrap();
    assert_eq!(broker.pid(), None);
    assert!(!greets(&vhost).await);
    assert!(greets(other.url()).await, "the neighbour is not touched");
    broker.start_again().await.unwrap();
    let name = vhost.rsplit('/').next().unwrap();
    assert!(
        broker.ctl(&["list_vhosts"]).await.unwrap().contains(name),
        "the vhost survived the crash"
    );

    broker.freeze().unwrap();
    let silent = tokio::time::timeout(Duration::from_millis(300), greets(&vhost)).await;
    assert!(
        silent.is_err(),
        "a frozen broker takes the connection and says nothing"
    );
    broker.thaw().unwrap();
    assert!(greets(&vhost).await);

    let pids = [broker.pid().unwrap(), other.pid().unwrap()];
    broker.freeze().unwrap();
    broker.end().await;
    assert!(!alive(pids[0]), "a frozen broker can be ended");
    drop(other);
    gone(&pids, &[]).await;
}

/// The first word that the server at a `nats://` address says.
async fn nats_greeting(url: &str) -> Option<String> {
    let address = url.rsplit(['@', '/']).next().unwrap();
    let stream = TcpStream::connect(address).await.ok()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await.ok()?;
    line.split(' ').next().map(str::to_owned)
}

#[tokio::test]
async fn nats_gives_accounts_and_survives_stops_crashes_and_company() {
    let (one, two) = tokio::join!(Nats::start(), Nats::start_with("max_payload: 65536"));
    let (Some(mut server), Some(other)) = (servers::required(one), servers::required(two)) else {
        return;
    };
    let accounts = [(); 3].map(|()| server.create_account().unwrap());
    assert!(accounts[0] != accounts[1] && accounts[1] != accounts[2]);
    assert!(!accounts.contains(&server.url().to_owned()));
    let info = Some("INFO".to_owned());
    assert_eq!(nats_greeting(&accounts[0]).await, info);

    server.restart().await.unwrap();
    assert_eq!(nats_greeting(server.url()).await, info);
    server.kill().await.unwrap();
    assert_eq!(server.pid(), None);
    assert_eq!(nats_greeting(server.url()).await, None);
    assert_eq!(
        nats_greeting(other.url()).await,
        info,
        "the neighbour is not touched"
    );
    server.start_again().await.unwrap();
    assert_eq!(nats_greeting(server.url()).await, info);
    assert!(!accounts.contains(&server.create_account().unwrap()));

    let pids = [server.pid().unwrap(), other.pid().unwrap()];
    server.freeze().unwrap();
    server.end().await;
    assert!(!alive(pids[0]), "a frozen server can be ended");
    drop(other);
    gone(&pids, &[]).await;
}

#[tokio::test]
async fn a_nats_setting_that_does_not_exist_is_a_failed_start_with_its_reason() {
    match Nats::start_with("no_such_setting: 1").await {
        Ok(_) => panic!("started"),
        Err(error) if error.is_missing() => drop(servers::required(Err::<(), _>(error))),
        Err(error) => assert!(error.to_string().contains("no_such_setting"), "{error}"),
    }
}

/// A frame in the middle, a lost confirm: what the proxy promises holds with a real server behind it too.
#[tokio::test]
async fn the_proxy_stands_before_a_real_server() {
    let Some(server) = servers::required(servers::postgres().await) else {
        return;
    };
    let url = server.create_database().await.unwrap();
    let (proxy, through) = Proxy::before(&url).await.unwrap();
    let mut connection = connect(&through).await;
    run(&mut connection, "CREATE TABLE here (id int)").await;

    proxy.hold(Direction::ToClient);
    let sent = proxy.counters().to_server;
    // In one message: a prepared statement would wait for the server's answer before it is run.
    let insert = sqlx::raw_sql("INSERT INTO here VALUES (1)").execute(&mut connection);
    let lose_the_answer = async {
        let mut witness = connect(&url).await;
        proxy.wait_for(|counters| counters.to_server > sent).await;
        while ask(&mut witness, "SELECT count(*) FROM here").await != "1" {}
        // The server has answered; the client shall never know.
        proxy.reset();
    };
    let both = async { tokio::join!(insert, lose_the_answer) };
    let (inserted, ()) = tokio::time::timeout(Duration::from_secs(30), both)
        .await
        .unwrap();
    assert!(
        inserted.is_err(),
        "the client saw an error and the row is there: an unknown outcome"
    );
    proxy.release();
    connect(&through).await;
    assert_eq!(proxy.counters().connections, 2);
}

/// Everything that a killed owner started: numbers from the files that its keeper reads, and the children of those.
struct Left {
    pids: Vec<u32>,
    folders: Vec<PathBuf>,
}

impl Left {
    fn by(folders: Vec<PathBuf>) -> Self {
        let mut pids = Vec::new();
        for folder in &folders {
            for entry in std::fs::read_dir(folder.join("run")).unwrap() {
                let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
                pids.push(text.split(' ').next().unwrap().parse().unwrap());
            }
        }
        let mut next = 0;
        while let Some(pid) = pids.get(next).copied() {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
                .unwrap_or_default();
            pids.extend(
                children
                    .split_whitespace()
                    .map(|child| child.parse::<u32>().unwrap()),
            );
            next += 1;
        }
        Self { pids, folders }
    }
}

#[tokio::test]
async fn a_killed_owner_leaves_nothing_behind() {
    let Some((mut owner, [postgres, control])) = owner(&["postgres", "rabbitmq"]).await else {
        return;
    };
    let data = ask(
        &mut connect(&postgres).await,
        "SELECT current_setting('data_directory')",
    )
    .await;
    let folders = [data, control]
        .iter()
        .map(|file| PathBuf::from(file).parent().unwrap().to_owned())
        .collect();
    let left = Left::by(folders);
    // postgres with its helpers, the node with its port programs, epmd.
    assert!(
        left.pids.len() >= 8 && left.pids.iter().all(|pid| alive(*pid)),
        "{:?}",
        left.pids
    );

    owner.kill().await.unwrap();
    gone(&left.pids, &left.folders).await;
}

/// The starter program with servers of its own, whatever addresses this process was given, and the two lines that its
/// command prints: `TEST_POSTGRES_URL` and `TEST_AMQP_CONTROL`. `None` when they are not installed: the tests that start
/// servers in this process have failed then, where they must not be missing.
async fn owner(names: &[&str]) -> Option<(tokio::process::Child, [String; 2])> {
    let mut owner = tokio::process::Command::new(env!("CARGO_BIN_EXE_pillarbox-servers"))
        .args(names)
        .args([
            "--",
            "sh",
            "-c",
            "echo $TEST_POSTGRES_URL; echo $TEST_AMQP_CONTROL; exec cat",
        ])
        .env_remove("TEST_POSTGRES_URL")
        .env_remove("TEST_AMQP_URL")
        .env_remove("TEST_AMQP_CONTROL")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut printed = BufReader::new(owner.stdout.take().unwrap()).lines();
    let lines = (
        printed.next_line().await.unwrap(),
        printed.next_line().await.unwrap(),
    );
    if let (Some(first), Some(second)) = lines {
        return Some((owner, [first, second]));
    }
    assert_eq!(
        owner.wait().await.unwrap().code(),
        Some(2),
        "it has said why on stderr"
    );
    None
}

#[tokio::test]
async fn the_starter_program_passes_signals_and_exit_codes_on_and_ends_its_servers() {
    for terminate in [false, true] {
        let Some((mut owner, [postgres, _])) = owner(&["postgres"]).await else {
            return;
        };
        let data = ask(
            &mut connect(&postgres).await,
            "SELECT current_setting('data_directory')",
        )
        .await;
        let left = Left::by(vec![PathBuf::from(data).parent().unwrap().to_owned()]);
        // Kept open while the signal travels: `wait` would close it, and the end of its input ends the command as well.
        let stdin = owner.stdin.take();
        if terminate {
            let pid =
                rustix::process::Pid::from_raw(owner.id().unwrap().try_into().unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            assert_eq!(owner.wait().await.unwrap().code(), Some(143));
        } else {
            drop(stdin);
            assert_eq!(owner.wait().await.unwrap().code(), Some(0));
        }
        assert!(
            left.folders.iter().all(|folder| !folder.exists())
                && !left.pids.iter().any(|pid| alive(*pid))
        );
    }
}
