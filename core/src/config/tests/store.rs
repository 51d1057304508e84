//! Opening the database, and what is said when it cannot be opened.

use crate::{Kind, config::StoreSettings};

#[track_caller]
fn refusal(opened: crate::Result<crate::Database>) -> (Kind, String) {
    let e = opened.expect_err("an error");
    let text = e.to_string();
    assert!(!format!("{text} {e:?}").contains("canary"), "{text}");
    (e.kind(), text)
}

async fn open(url: &str) -> (Kind, String) {
    refusal(StoreSettings::new(url).open().await)
}

#[tokio::test]
async fn no_database_is_named() {
    let (kind, text) = refusal(StoreSettings::default().open().await);
    assert_eq!(kind, Kind::Configuration);
    let expected = "read configuration: store: found neither url nor url_file, expected one of them, such as url = \
                    \"sqlite://data/events.db\"";
    assert_eq!(text, expected);
}

#[tokio::test]
async fn a_url_that_is_none_is_not_shown() {
    let forms = "postgres://user:password@host:5432/database or sqlite://folder/file.db";
    for (url, found) in [
        ("shop:canary@host/db", "a text that is no URL (not shown)"),
        ("canary", "a text that is no URL (not shown)"),
        ("", "a text that is no URL (not shown)"),
        (
            "mysql://shop:canary@host/db",
            "a URL that begins with mysql:",
        ),
    ] {
        let found = match url.starts_with("shop") {
            true => "a URL that begins with shop:",
            false => found,
        };
        let (kind, text) = open(url).await;
        assert_eq!(kind, Kind::Configuration);
        assert_eq!(
            text,
            format!("read configuration: store.url: found {found}, expected {forms}")
        );
    }
    let (_, text) = open("postgre://shop:canary@host/db").await;
    assert!(text.ends_with("(postgres?)"), "{text}");
}

#[tokio::test]
async fn the_schemas_name_is_checked_before_anything_is_opened() {
    let mut settings = StoreSettings::new("postgres://shop:canary@127.0.0.1:1/db");
    settings.schema = "Pillar Box".into();
    let (kind, text) = refusal(settings.open().await);
    assert_eq!(kind, Kind::Configuration);
    assert!(
        text.starts_with(
            "read configuration: store.schema: found \"Pillar Box\", expected a lower-case"
        ),
        "{text}"
    );
}

#[tokio::test]
async fn a_url_file_is_read_when_the_database_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("url");
    let toml = format!("[store]\nurl_file = {file:?}");
    let settings = super::settings(&toml, &[]).store;
    let (kind, text) = refusal(settings.open().await);
    assert_eq!(kind, Kind::Configuration);
    let expected = "which cannot be read, expected a file that holds the URL: No such file or directory (os error 2)";
    assert!(
        text.contains("line 2: store.url_file: found ") && text.ends_with(expected),
        "{text}"
    );
    std::fs::write(&file, "mysql://shop:canary@host/db\n").unwrap();
    let (_, text) = refusal(settings.open().await);
    assert!(
        text.contains("store.url_file: found a URL that begins with mysql:"),
        "{text}"
    );
}

#[cfg(feature = "postgres")]
mod postgres {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn an_unreachable_database_is_named_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (kind, text) = open(&format!("postgres://shop:canary@127.0.0.1:{port}/db")).await;
        assert_eq!(kind, Kind::Unavailable);
        let expected = format!(
            "open database: PostgreSQL at 127.0.0.1:{port} (database \"db\") cannot be reached: "
        );
        assert!(
            text.starts_with(&expected) && text.contains("refused"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_database_that_is_silent_is_given_up_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut settings =
            StoreSettings::new(format!("postgres://shop:canary@127.0.0.1:{port}/db"));
        settings.connect_timeout = Duration::from_millis(100);
        let (kind, text) = refusal(settings.open().await);
        assert_eq!(kind, Kind::Unavailable);
        let expected = format!(
            "open database: PostgreSQL at 127.0.0.1:{port} (database \"db\") gave no answer within 100ms"
        );
        assert_eq!(text, expected);
    }

    /// A server that answers the first message with this error.
    async fn server(state: &str, message: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let fields = format!("SFATAL\0VFATAL\0C{state}\0M{message}\0\0");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let mut answer = vec![b'E'];
            answer.extend(u32::try_from(fields.len() + 4).unwrap().to_be_bytes());
            answer.extend(fields.as_bytes());
            stream.write_all(&answer).await.unwrap();
            // Until the client has read it and gone.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        });
        format!("postgres://shop:canary@127.0.0.1:{port}/db?sslmode=disable")
    }

    #[tokio::test]
    async fn what_the_database_refuses_is_told_apart() {
        for (state, kind, expected) in [
            (
                "28P01",
                Kind::Configuration,
                "refuses the user \"shop\" or its password",
            ),
            (
                "28000",
                Kind::Configuration,
                "refuses the user \"shop\" or its password",
            ),
            (
                "3D000",
                Kind::Configuration,
                "has no database \"db\": create it, or name another",
            ),
            ("53300", Kind::Unavailable, "has no connection left"),
            ("57P03", Kind::Unavailable, "does not take connections now"),
            ("XX000", Kind::Configuration, "refuses the connection"),
        ] {
            let url = server(state, "no").await;
            let (found, text) = open(&url).await;
            assert_eq!(found, kind, "{state}");
            let expected =
                format!("(database \"db\") {expected}: error returned from database: no");
            assert!(
                text.starts_with("open database: PostgreSQL at 127.0.0.1:"),
                "{text}"
            );
            assert!(text.contains(&expected), "{text}\nshould have\n{expected}");
        }
    }

    #[tokio::test]
    async fn a_password_that_breaks_the_url_is_not_shown() {
        for password in [
            "can#canary",
            "can?canary",
            "can/canary",
            "12#canary",
            "12?canary",
            "12/canary",
            "can@canary",
            "can:canary",
            "can ary",
            "%zzcanary",
            "[canary",
            "?sslmode=canary",
        ] {
            let url = format!("postgres://shop:{password}@127.0.0.1:1/db");
            let (_, text) = open(&url).await;
            assert!(!text.contains("canary"), "{password}: {text}");
        }
        let (_, text) = open("postgres://shop:12#canary@127.0.0.1/db").await;
        assert!(text.contains("%23"), "{text}");
    }

    #[tokio::test]
    async fn a_misspelt_parameter_is_refused_because_the_driver_would_ignore_it() {
        let (_, text) = open("postgres://shop@127.0.0.1:1/db?ssl_mode=require").await;
        assert!(
            text.contains("found the parameter \"ssl_mode\", expected one of sslmode, "),
            "{text}"
        );
        assert!(
            text.ends_with("(sslmode?)") || text.ends_with("(ssl-mode?)"),
            "{text}"
        );
        let (_, text) = open("postgres://shop@127.0.0.1:1/db?sslmode=required").await;
        assert!(
            text.contains("found an unknown sslmode, expected one of disable, "),
            "{text}"
        );
        let (_, text) = open("postgres://127.0.0.1:1/db?user=shop&password=canary").await;
        assert!(
            text.contains(
                "found the parameter \"user\", expected user and password before the host"
            ),
            "{text}"
        );
        let (kind, text) =
            open("postgres://shop@127.0.0.1:1/db?sslmode=require&options[lock_timeout]=1s").await;
        assert_eq!(kind, Kind::Unavailable, "{text}");
    }
}

#[cfg(feature = "sqlite")]
mod sqlite {
    use crate::connection::Pool;

    use super::*;

    async fn pragma(pool: &sqlx::SqlitePool, name: &'static str) -> String {
        let value: String = sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
            "SELECT CAST({name} AS TEXT) FROM pragma_{name}"
        )))
        .fetch_one(pool)
        .await
        .unwrap();
        value
    }

    #[tokio::test]
    async fn a_missing_file_is_made_safe_and_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("data/shop #1.db");
        let url = format!(
            "sqlite://{}",
            file.display().to_string().replace('#', "%23")
        );
        let database = StoreSettings::new(url).open().await.unwrap();
        let Some(Pool::Sqlite(pool)) = database.pool() else {
            panic!("no SQLite pool");
        };
        for (name, expected) in [
            ("journal_mode", "wal"),
            ("synchronous", "2"),
            ("foreign_keys", "1"),
        ] {
            assert_eq!(pragma(&pool, name).await, expected, "{name}");
        }
        let timeout: i64 = sqlx::query_scalar("PRAGMA busy_timeout")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(timeout, 5_000);
        sqlx::raw_sql("CREATE TABLE a (b)")
            .execute(&pool)
            .await
            .unwrap();
        crate::migrate(&database).await.unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = |path: &std::path::Path| {
                std::fs::metadata(path).unwrap().permissions().mode() & 0o777
            };
            assert_eq!(mode(file.parent().unwrap()), 0o700);
            for entry in std::fs::read_dir(file.parent().unwrap()).unwrap() {
                let path = entry.unwrap().path();
                assert_eq!(mode(&path), 0o600, "{path:?}");
            }
        }
    }

    #[tokio::test]
    async fn programs_that_start_together_all_open_it() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", folder.path().join("shop.db").display());
        let opens = (0..8).map(|_| {
            let settings = StoreSettings::new(url.clone());
            tokio::spawn(async move { settings.open().await.map(drop) })
        });
        for opened in futures_util::future::join_all(opens).await {
            opened.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_no_database_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (kind, text) = open(&format!("sqlite://{}", folder.path().display())).await;
        assert_eq!(kind, Kind::Unavailable);
        let start = format!(
            "open database: the SQLite file {} cannot be used: ",
            folder.path().display()
        );
        assert!(text.starts_with(&start), "{text}");

        let file = folder.path().join("notes.txt");
        std::fs::write(
            &file,
            "no database, but long enough to have a header ".repeat(20),
        )
        .unwrap();
        let (kind, text) = open(&format!("sqlite://{}", file.display())).await;
        assert_eq!(kind, Kind::Configuration);
        assert!(text.contains("file is not a database"), "{text}");

        let (kind, text) = open(&format!(
            "sqlite://{}/no/such/shop.db",
            folder.path().display()
        ))
        .await;
        assert_eq!(kind, Kind::Configuration);
        assert!(
            text.contains(
                "no/such/shop.db, which cannot be made, expected a file in a folder that is there"
            ),
            "{text}"
        );

        let (kind, text) = open(&format!(
            "sqlite://{}/none.db?mode=rw",
            folder.path().display()
        ))
        .await;
        assert_eq!(kind, Kind::Unavailable);
        assert!(text.contains("none.db cannot be used: "), "{text}");
        assert!(!folder.path().join("none.db").exists());
    }

    #[tokio::test]
    async fn what_does_not_last_is_refused() {
        for url in [
            "sqlite::memory:",
            "sqlite://:memory:",
            "sqlite://",
            "sqlite:",
        ] {
            let (kind, text) = open(url).await;
            assert_eq!(kind, Kind::Configuration);
            assert!(
                text.contains("store.url: found no file, expected a file"),
                "{url}: {text}"
            );
        }
        for mode in ["memory", "ro"] {
            let (_, text) = open(&format!("sqlite://a.db?mode={mode}")).await;
            assert!(
                text.contains("found another mode, expected mode=rw or mode=rwc"),
                "{text}"
            );
        }
        let (_, text) = open("sqlite://a.db?cash=shared").await;
        assert!(
            text.contains("found the parameter \"cash\", expected mode, or none"),
            "{text}"
        );
    }
}
