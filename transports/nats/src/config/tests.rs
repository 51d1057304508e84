use super::*;

const URL: &str = "nats://user:canary@nats.example:4223";
