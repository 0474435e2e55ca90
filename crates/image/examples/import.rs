//! Imports an image into a store of its own, to look at and to measure: `import STORE NAME PATH`.
use std::{collections::BTreeMap, path::Path, time::Instant};

use doze_image::{ImageError, ImageStore};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, store, name, path] = arguments.as_slice() else {
        return Err("usage: import STORE NAME PATH".into());
    };
    let begin = Instant::now();
    let imported = ImageStore::open(Path::new(store))?.import(
        name,
        Path::new(path),
        None,
        BTreeMap::new(),
        &mut |event| println!("{:6} ms  {event:?}", begin.elapsed().as_millis()),
    );
    match imported {
        Ok(image) => println!("{image:#?}"),
        Err(ImageError::Io { context, source }) => {
            return Err(format!("{context}: {source}").into());
        }
        Err(e) => return Err(e.into()),
    }
    Ok(())
}
