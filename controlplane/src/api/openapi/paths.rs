//! Paths of the document.

use serde_json::{Map, Value, json};

use super::schema;

pub(super) fn paths() -> Value {
    let mut paths = Map::new();
    for (path, method, operation) in operations() {
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[method] = operation;
    }
    paths.into()
}

type Operation = (&'static str, &'static str, Value);

fn operations() -> Vec<Operation> {
    let mut all = machines();
    all.extend(migrations());
    all.extend(others());
    all
}

fn machines() -> Vec<Operation> {
    let machine = || path_parameter("machine", "Name or id of a machine.");
    let key =
        || header("Idempotency-Key", "Up to 255 printable characters; a repetition gets the first answer.");
    vec![
        (
            "/v1/machines",
            "post",
            operation(
                "Create a machine and boot it",
                vec![key()],
                Some("LaunchRequest"),
                &[("201", "Machine")],
            ),
        ),
        (
            "/v1/machines",
            "get",
            operation(
                "List machines by id",
                vec![
                    query("state", "string", "Only in this state."),
                    query("host", "string", "Only on this host."),
                    query("name", "string", "Only of this name."),
                    limit(),
                    query("cursor", "string", "`next_cursor` of the page before."),
                ],
                None,
                &[("200", "MachineList")],
            ),
        ),
        (
            "/v1/machines/{machine}",
            "get",
            operation("One machine", vec![machine()], None, &[("200", "Machine")]),
        ),
        (
            "/v1/machines/{machine}",
            "delete",
            operation(
                "Remove a machine; 202 while its host still ends it",
                vec![machine(), query("force", "boolean", "Also a running one, and one whose host is lost.")],
                None,
                &[("200", "Destroyed"), ("202", "Machine")],
            ),
        ),
        (
            "/v1/machines/{machine}/start",
            "post",
            operation(
                "Boot a stopped or failed machine again",
                vec![machine(), key()],
                Some("Nothing"),
                &[("202", "Machine")],
            ),
        ),
        (
            "/v1/machines/{machine}/stop",
            "post",
            operation(
                "End a machine; its RAM is gone, its disks, name and addresses stay",
                vec![machine(), key()],
                Some("StopRequest"),
                &[("202", "Machine")],
            ),
        ),
        (
            "/v1/machines/{machine}/migrate",
            "post",
            operation(
                "Move a running machine; `Location` names the migration",
                vec![machine(), key()],
                Some("MigrateRequest"),
                &[("202", "Migration")],
            ),
        ),
        (
            "/v1/machines/{machine}/wait",
            "get",
            operation(
                "Wait for a state; 408 when it does not come in time, 409 when it cannot come any more",
                vec![
                    machine(),
                    query("state", "string", "The state; `started` when absent."),
                    query("timeout", "integer", "Seconds, at most 600; 60 when absent."),
                ],
                None,
                &[("200", "Machine")],
            ),
        ),
        (
            "/v1/machines/{machine}/logs",
            "get",
            logs(vec![
                machine(),
                query("offset", "integer", "First byte, counted over the machine's life."),
                query("limit_bytes", "integer", "Most bytes, up to 1 MiB."),
                query("follow", "boolean", "Wait up to 20 s for output."),
            ]),
        ),
    ]
}

fn migrations() -> Vec<Operation> {
    let migration = || path_parameter("migration", "Id of a migration.");
    vec![
        (
            "/v1/migrations",
            "get",
            operation(
                "List migrations, newest first",
                vec![
                    query("machine", "string", "Only of this machine."),
                    query("phase", "string", "Only in this phase."),
                    limit(),
                    query("cursor", "string", "`next_cursor` of the page before."),
                ],
                None,
                &[("200", "MigrationList")],
            ),
        ),
        (
            "/v1/migrations/{migration}",
            "get",
            operation("One migration", vec![migration()], None, &[("200", "Migration")]),
        ),
        (
            "/v1/migrations/{migration}/cancel",
            "post",
            operation(
                "Ask to cancel; it may be too late",
                vec![migration()],
                Some("Nothing"),
                &[("202", "Migration")],
            ),
        ),
        (
            "/v1/migrations/{migration}/watch",
            "get",
            stream(
                "The migration each time it changes, until it has ended (event `migration`)",
                vec![migration()],
            ),
        ),
    ]
}

fn others() -> Vec<Operation> {
    vec![
        ("/v1/hosts", "get", operation("All hosts", vec![], None, &[("200", "HostList")])),
        (
            "/v1/hosts/{host}",
            "get",
            operation("One host", vec![path_parameter("host", "Name of a host.")], None, &[("200", "Host")]),
        ),
        (
            "/v1/events",
            "get",
            stream(
                "What happens, as it happens; can be resumed with `after` or Last-Event-ID. With follow=false a page of what is kept, as JSON",
                vec![
                    query("after", "integer", "Only events after this id; absent: from now on."),
                    query("follow", "boolean", "false: a page instead of a stream."),
                    limit(),
                    header("Last-Event-ID", "As `after`, and before it."),
                ],
            ),
        ),
        ("/healthz", "get", open("Whether the control plane answers", "application/json")),
        ("/metrics", "get", text_operation("Figures in the Prometheus text format")),
        ("/v1/openapi.json", "get", open("This document", "application/json")),
    ]
}

fn operation(summary: &str, parameters: Vec<Value>, body: Option<&str>, answers: &[(&str, &str)]) -> Value {
    let mut responses = Map::new();
    for (status, name) in answers {
        let content = json!({"application/json": {"schema": schema(name)}});
        responses.insert((*status).to_owned(), json!({"description": name, "content": content}));
    }
    responses.insert("default".to_owned(), problem());
    let mut operation = json!({"summary": summary, "parameters": parameters, "responses": responses});
    if let Some(name) = body {
        operation["requestBody"] = json!({"content": {"application/json": {"schema": schema(name)}}});
    }
    operation
}

fn problem() -> Value {
    let content = json!({"application/problem+json": {"schema": schema("Problem")}});
    json!({"description": "A problem", "content": content})
}

fn stream(summary: &str, parameters: Vec<Value>) -> Value {
    let responses = json!({
        "200": {"description": "Server-sent events", "content": {"text/event-stream": {}}},
        "default": problem()
    });
    json!({"summary": summary, "parameters": parameters, "responses": responses})
}

fn logs(parameters: Vec<Value>) -> Value {
    let head = |description: &str, kind: &str| json!({"description": description, "schema": {"type": kind}});
    json!({
        "summary": "Serial console output, as bytes",
        "parameters": parameters,
        "responses": {
            "200": {
                "description": "Output",
                "content": {"application/octet-stream": {}},
                "headers": {
                    "X-Offset": head("Offset of the first byte; above the one asked for when older output is gone.", "integer"),
                    "X-Next-Offset": head("Offset to ask for next.", "integer"),
                    "X-Live": head("Whether more may come.", "boolean")
                }
            },
            "default": problem()
        }
    })
}

fn open(summary: &str, content_type: &str) -> Value {
    let responses = json!({"200": {"description": summary, "content": {content_type: {}}}});
    json!({"summary": summary, "security": [], "responses": responses})
}

fn text_operation(summary: &str) -> Value {
    let responses = json!({
        "200": {"description": summary, "content": {"text/plain": {}}},
        "default": problem()
    });
    json!({"summary": summary, "responses": responses})
}

fn path_parameter(name: &str, description: &str) -> Value {
    json!({"name": name, "in": "path", "required": true, "description": description, "schema": {"type": "string"}})
}

fn query(name: &str, kind: &str, description: &str) -> Value {
    json!({"name": name, "in": "query", "description": description, "schema": {"type": kind}})
}

fn limit() -> Value {
    query("limit", "integer", "Most items, up to 1000; 100 when absent.")
}

fn header(name: &str, description: &str) -> Value {
    json!({"name": name, "in": "header", "description": description, "schema": {"type": "string"}})
}
