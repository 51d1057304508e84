//! A wrong password: said which server refuses, and never the password.

use pillarbox_tests::{
    World,
    node::{Node, Task},
    on_servers_alone,
};

use crate::NODE;

on_servers_alone!(a_wrong_password_is_told_and_not_shown);

const WRONG: &str = "hunter2-not-this";

/// The same address with another password.
fn wrong(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").expect("an address");
    let (login, host) = rest.rsplit_once('@').expect("a login");
    let (user, _) = login.split_once(':').expect("a password");
    format!("{scheme}://{user}:{WRONG}@{host}")
}

async fn a_wrong_password_is_told_and_not_shown(world: World) {
    let amqp = world.amqp_url.as_deref().map(wrong);
    let relay = Task::relay(&world);
    let consumer = Task::consumer(&world);
    let cases = [
        (
            Task {
                producer: Some(wrong(&world.urls.0)),
                ..relay.clone()
            },
            "password authentication failed",
        ),
        (
            Task {
                consumer: Some(wrong(&world.urls.1)),
                ..consumer.clone()
            },
            "password authentication failed",
        ),
        (
            Task {
                amqp: amqp.clone(),
                ..relay
            },
            "ACCESS_REFUSED",
        ),
        (Task { amqp, ..consumer }, "ACCESS_REFUSED"),
    ];
    for (task, text) in cases {
        let mut node = Node::start(NODE, &task);
        node.says(text).await;
        let said = node.said();
        assert!(!said.contains(WRONG), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        node.kill().await;
    }
}
