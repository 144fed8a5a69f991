//! The OpenAPI document that `/v1/openapi.json` serves.
//!
//! Written by hand, because it is read by people as much as by generators; tests hold it against real answers and real routes, so that it
//! cannot fall behind.

mod paths;
mod schemas;

use serde_json::{Value, json};

/// The document.
pub fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "mashines",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Machines that move between hosts while they run. Errors are application/problem+json with a stable `code` and a `remedy`. Points in time are milliseconds since the Unix epoch.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}
        },
        "security": [{"token": []}],
        "paths": paths::paths(),
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas::schemas()
        }
    })
}

/// A reference to a schema.
fn schema(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every reference leads somewhere.
    #[test]
    fn references_resolve() {
        let document = document();
        let text = document.to_string();
        let mut seen = 0;
        for rest in text.split("\"#/components/schemas/").skip(1) {
            let name = rest.split('"').next().unwrap();
            assert!(document["components"]["schemas"].get(name).is_some(), "no schema {name}");
            seen += 1;
        }
        assert!(seen > 20, "only {seen} references");
    }
}
