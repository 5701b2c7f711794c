//! Every dependency may be used under a licence that deny.toml allows: the part of `cargo deny` that needs no network.

use std::path::Path;
use std::process::Command;

/// Whether an SPDX expression can be satisfied with `allowed`. Knows OR, AND, WITH, slashes and brackets.
fn satisfied(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let value = any(&tokens, &mut at, allowed);
    assert_eq!(at, tokens.len(), "cannot read the licence expression {expression:?}");
    value
}

fn any(tokens: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut value = all(tokens, at, allowed);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        value |= all(tokens, at, allowed);
    }
    value
}

fn all(tokens: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut value = one(tokens, at, allowed);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        value &= one(tokens, at, allowed);
    }
    value
}

fn one(tokens: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let token = tokens.get(*at).expect("a licence expression ends too early");
    *at += 1;
    if *token == "(" {
        let value = any(tokens, at, allowed);
        assert_eq!(tokens.get(*at), Some(&")"));
        *at += 1;
        return value;
    }
    if tokens.get(*at) == Some(&"WITH") {
        // An exception only grants more.
        *at += 2;
    }
    allowed.contains(token)
}

#[test]
fn every_dependency_has_a_licence_that_is_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let deny: toml::Table = std::fs::read_to_string(root.join("deny.toml")).unwrap().parse().unwrap();
    let allowed: Vec<&str> =
        deny["licenses"]["allow"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    // Only what this platform builds: the sources of the rest are not here.
    let host =
        if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", host])
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50, "{} packages", packages.len());
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(satisfied(licence, &allowed), "{} {}: {licence}", package["name"], package["version"]);
    }
}

#[test]
fn licence_expressions_are_read_rightly() {
    for (expression, expected) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("MIT AND GPL-3.0", false),
        ("MIT/Apache-2.0", true),
        ("(GPL-3.0 OR MIT) AND Apache-2.0", true),
        ("Apache-2.0 WITH LLVM-exception", true),
    ] {
        assert_eq!(satisfied(expression, &["MIT", "Apache-2.0"]), expected, "{expression}");
    }
}
