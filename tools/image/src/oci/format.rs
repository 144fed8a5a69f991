//! The JSON of OCI and Docker images, as far as it matters here. Unknown fields are another release's.

use serde::{Deserialize, Deserializer};

use super::OciError;
use super::limits::LAYERS_MAX;
use crate::digest::Digest;
use crate::manifest::Config;

/// Media types of lists of images.
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
/// Media types of images.
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
/// Media types of configurations.
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// Media types of layers that can be unpacked.
const LAYERS: [&str; 5] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
];

/// What registries are asked for.
pub(super) fn accepted() -> Vec<&'static str> {
    INDEXES.into_iter().chain(MANIFESTS).collect()
}

/// A blob of an image.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    pub platform: Option<Platform>,
}

/// Whom an image is for.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Platform {
    pub architecture: String,
    pub os: String,
}

impl Platform {
    fn fits(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

/// A list of images, or an image.
pub(super) enum Document {
    /// Which of them is meant for us.
    Index(Descriptor),
    /// The image.
    Manifest(ImageManifest),
}

/// An image.
#[derive(Debug, Deserialize)]
pub(super) struct ImageManifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Either {
    #[serde(default)]
    media_type: String,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// Reads a list of images or an image, and checks its media types.
pub(super) fn document(bytes: &[u8]) -> Result<Document, OciError> {
    let either: Either = serde_json::from_slice(bytes)
        .map_err(|source| OciError::Json { what: "the image's manifest", source })?;
    let known = INDEXES.into_iter().chain(MANIFESTS).any(|known| known == either.media_type);
    if !either.media_type.is_empty() && !known {
        return Err(OciError::MediaType(short(&either.media_type)));
    }
    match (either.manifests, either.config, either.layers) {
        (Some(manifests), None, None) => ours(manifests).map(Document::Index),
        (None, Some(config), Some(layers)) => {
            let manifest = ImageManifest { config, layers };
            check(&manifest)?;
            Ok(Document::Manifest(manifest))
        }
        _ => Err(OciError::Malformed("its manifest is neither one nor a list")),
    }
}

/// The one of a list that is for us. One without a platform is taken if it is alone.
fn ours(manifests: Vec<Descriptor>) -> Result<Descriptor, OciError> {
    let alone = manifests.len() == 1;
    let shown: Vec<String> = manifests
        .iter()
        .take(8)
        .filter_map(|one| one.platform.as_ref())
        .map(|platform| short(&format!("{}/{}", platform.os, platform.architecture)))
        .collect();
    manifests.into_iter().find(|one| one.platform.as_ref().map_or(alone, Platform::fits)).ok_or_else(|| {
        OciError::Architecture(if shown.is_empty() { "nothing".to_owned() } else { shown.join(", ") })
    })
}

fn check(manifest: &ImageManifest) -> Result<(), OciError> {
    if !CONFIGS.contains(&manifest.config.media_type.as_str()) {
        return Err(OciError::MediaType(short(&manifest.config.media_type)));
    }
    if manifest.layers.is_empty() {
        return Err(OciError::Malformed("it has no layers"));
    }
    if manifest.layers.len() > LAYERS_MAX {
        return Err(OciError::TooLarge { what: "layers", limit: LAYERS_MAX as u64 });
    }
    match manifest.layers.iter().find(|layer| !LAYERS.contains(&layer.media_type.as_str())) {
        Some(layer) => Err(OciError::MediaType(short(&layer.media_type))),
        None => Ok(()),
    }
}

fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(100).collect()
}

/// What `docker save` writes besides.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DockerManifest {
    pub config: String,
    pub layers: Vec<String>,
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Runs>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// What runs; Docker writes `null` for what is empty.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Runs {
    #[serde(deserialize_with = "or_default")]
    user: String,
    #[serde(deserialize_with = "or_default")]
    exposed_ports: std::collections::BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    working_dir: String,
    #[serde(deserialize_with = "or_default")]
    stop_signal: String,
}

fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Reads an image's configuration: what runs, and what each layer must unpack to.
pub(super) fn config(bytes: &[u8]) -> Result<(Config, Vec<Digest>), OciError> {
    let file: ConfigFile = serde_json::from_slice(bytes)
        .map_err(|source| OciError::Json { what: "the image's configuration", source })?;
    let platform = Platform { architecture: file.architecture, os: file.os };
    if !platform.fits() {
        return Err(OciError::Architecture(short(&format!("{}/{}", platform.os, platform.architecture))));
    }
    let runs = file.config.unwrap_or_default();
    let config = Config {
        entrypoint: runs.entrypoint,
        cmd: runs.cmd,
        env: runs.env,
        user: runs.user,
        workdir: runs.working_dir,
        stop_signal: runs.stop_signal,
        exposed_ports: runs.exposed_ports.into_keys().collect(),
    };
    Ok((config, file.rootfs.diff_ids))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::digest_of;

    fn descriptor(media_type: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"{}","size":1}}"#, digest_of(b"x"))
    }

    fn manifest(config: &str, layer: &str) -> String {
        format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, descriptor(config), descriptor(layer))
    }

    #[test]
    fn media_types_are_checked() {
        assert!(matches!(document(manifest(CONFIGS[0], LAYERS[2]).as_bytes()), Ok(Document::Manifest(_))));
        for (config, layer) in [
            (CONFIGS[0], "application/vnd.oci.image.layer.v1.tar+encrypted"),
            (CONFIGS[0], "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            ("application/vnd.cncf.helm.config.v1+json", LAYERS[0]),
        ] {
            assert!(matches!(document(manifest(config, layer).as_bytes()), Err(OciError::MediaType(_))));
        }
        let signed = r#"{"mediaType":"application/vnd.docker.distribution.manifest.v1+prettyjws"}"#;
        assert!(matches!(document(signed.as_bytes()), Err(OciError::MediaType(_))));
    }

    #[test]
    fn the_platform_is_ours_or_none() {
        let one = |os: &str, architecture: &str| {
            format!(
                r#"{{"digest":"{}","size":1,"platform":{{"os":"{os}","architecture":"{architecture}"}}}}"#,
                digest_of(architecture.as_bytes())
            )
        };
        let index = |ones: &[String]| format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, ones.join(","));
        let both = index(&[one("linux", "arm64"), one("linux", "amd64")]);
        let Ok(Document::Index(found)) = document(both.as_bytes()) else { panic!("no index") };
        assert_eq!(found.digest, digest_of(b"amd64"));
        for none in [index(&[one("linux", "arm64")]), index(&[one("windows", "amd64")]), index(&[])] {
            assert!(matches!(document(none.as_bytes()), Err(OciError::Architecture(_))));
        }
        let arm = r#"{"os":"linux","architecture":"arm64","rootfs":{"diff_ids":[]}}"#;
        assert!(matches!(config(arm.as_bytes()), Err(OciError::Architecture(text)) if text == "linux/arm64"));
    }

    #[test]
    fn nulls_of_docker_are_nothing() {
        let text = r#"{"os":"linux","architecture":"amd64","config":{"Entrypoint":null,"Cmd":["sh"],"ExposedPorts":{"80/tcp":{}}},"rootfs":{"diff_ids":[]}}"#;
        let (config, _) = config(text.as_bytes()).unwrap();
        assert_eq!(
            (config.entrypoint.len(), config.cmd, config.exposed_ports),
            (0, vec!["sh".to_owned()], vec!["80/tcp".to_owned()])
        );
    }
}
