//! What a machine is made of when it is launched from an image.

use std::collections::BTreeMap;

use image::manifest::Manifest;
use wire::ids::Digest;
use wire::space::DiskSize;

use super::machines::bad_value;
use crate::api::{LaunchRequest, Problem};
use crate::store::records::{Boot, DiskRecord, Guest};

/// Longest user data, in bytes of base64.
const USER_DATA_BYTES_MAX: usize = 48 << 10;
/// Most public keys of one machine, and the longest of them in bytes.
const KEYS: (usize, usize) = (64, 4096);
/// Name of the disk that the image lies under.
const ROOT: &str = "root";

/// What an image and a request make together.
pub(super) struct Made {
    pub(super) boot: Boot,
    pub(super) disks: Vec<DiskRecord>,
    pub(super) guest: Guest,
}

/// Checks what a request says of its guest, and puts the image's part to it.
pub(super) fn make(request: &LaunchRequest, image: &Manifest) -> Result<Made, Problem> {
    if request.kernel.is_some() || request.initrd.is_some() {
        return Err(bad_value(
            "an image and a kernel",
            "give --image or --kernel, not both: an image has its own kernel",
        ));
    }
    let cmdline = match &request.cmdline {
        Some(more) => format!("{} {more}", image.cmdline),
        None => image.cmdline.clone(),
    };
    let boot = Boot {
        kernel: image.kernel.digest.to_string(),
        initrd: Some(image.initrd.digest.to_string()),
        cmdline,
    };
    let bytes = request.disk_bytes.unwrap_or(image.disk.bytes);
    if let Err(error) = DiskSize::from_bytes(bytes) {
        return Err(bad_value(error.to_string(), "give for example --disk 8G"));
    }
    if bytes < image.disk.bytes {
        return Err(bad_value(
            format!("a disk of {} MiB", bytes >> 20),
            format!("the image alone has {} MiB: give more", image.disk.bytes.div_ceil(1 << 20)),
        ));
    }
    let base: Digest =
        image.disk.digest.to_string().parse().map_err(|error: wire::ids::ParseIdError| {
            bad_value(error.to_string(), "import the image again")
        })?;
    let name = ROOT.parse().map_err(|error: wire::ids::ParseIdError| bad_value(error.to_string(), ""))?;
    let disks = vec![DiskRecord { name, bytes, base: Some(base) }];
    Ok(Made { boot, disks, guest: guest(request, image)? })
}

fn guest(request: &LaunchRequest, image: &Manifest) -> Result<Guest, Problem> {
    let (keys_max, key_bytes_max) = KEYS;
    let bad_key = |key: &String| {
        key.len() > key_bytes_max || key.split_whitespace().count() < 2 || key.chars().any(char::is_control)
    };
    if request.ssh_keys.len() > keys_max || request.ssh_keys.iter().any(bad_key) {
        return Err(bad_value(
            "something that is no list of SSH public keys",
            format!("give at most {keys_max} lines as in a .pub file: `ssh-ed25519 AAAA... name`"),
        ));
    }
    let user_data = request.user_data_base64.clone();
    if user_data.as_ref().is_some_and(|data| data.len() > USER_DATA_BYTES_MAX) {
        return Err(bad_value(
            "user data that is too long",
            format!("give at most {USER_DATA_BYTES_MAX} bytes of base64"),
        ));
    }
    let of_image = image.config.env.iter().filter_map(|pair| pair.split_once('='));
    let mut env: BTreeMap<String, String> =
        of_image.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    env.extend(request.env.clone());
    let whole: Vec<String> = image.config.entrypoint.iter().chain(&image.config.cmd).cloned().collect();
    let entrypoint = request.entrypoint.clone().or_else(|| Some(whole).filter(|words| !words.is_empty()));
    Ok(Guest {
        configured: true,
        ssh_keys: request.ssh_keys.clone(),
        env,
        user_data_base64: user_data,
        entrypoint,
    })
}
