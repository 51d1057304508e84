//! The program: what it refuses, and how.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::process::Command;

#[test]
fn memory_is_refused_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("inventory.toml");
    let text = "transport.kind = 'memory'\n[inventory]\nstore.url = 'sqlite://unused.db'\nhttp.listen = '127.0.0.1:0'";
    std::fs::write(&config, text).unwrap();
    let ended = Command::new(env!("CARGO_BIN_EXE_inventory"))
        .arg("--config")
        .arg(&config)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(2), "{said}");
    assert!(
        said.contains("works within one process only: run `shop`"),
        "{said}"
    );
}

#[test]
fn a_missing_file_is_named() {
    let ended = Command::new(env!("CARGO_BIN_EXE_inventory"))
        .args(["--config", "/nowhere/inventory.toml"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(2), "{said}");
    assert!(said.contains("/nowhere/inventory.toml"), "{said}");
}
