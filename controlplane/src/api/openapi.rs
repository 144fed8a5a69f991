//! The OpenAPI document that `/v1/openapi.json` serves.

/// The document.
pub fn document() -> serde_json::Value {
    serde_json::json!({"openapi": "3.1.0", "info": {"title": "mashines", "version": env!("CARGO_PKG_VERSION")}, "paths": {}})
}
