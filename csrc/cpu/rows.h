// Reads and writes rows of a block of channels as [pixel][channel], for any layout and storage type. Vector code,
// compiled once per instruction set.

using pixnorm::kBlock;

// A block of channels of one image in memory. Kernels see it as A, whatever the layout and the storage type.
template <class A>
struct Plane {
  void* data;
  int64_t pixel_stride, channel_stride;
  int64_t image_stride;  // to the same block of the next image
  int channels;          // <= kBlock
  int element;           // bytes
  void (*read)(const Plane&, int64_t first, int64_t count, A* to);
  void (*write)(const Plane&, int64_t first, int64_t count, const A* from);

  PIXNORM_INLINE void next_image() { data = static_cast<char*>(data) + image_stride * element; }
};

// Pixels [first, first + count) of a plane as [pixel][kBlock]; the lanes of absent channels are unspecified.
template <class T>
void read_pixels(const Plane<acc_t<T>>& plane, int64_t first, int64_t count, acc_t<T>* to) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  const T* from = static_cast<const T*>(plane.data) + first * plane.pixel_stride;
  if (plane.channel_stride == 1 && plane.channels == kBlock) {
    for (int64_t i = 0; i < count; ++i) {
      const T* pixel = from + i * plane.pixel_stride;
#pragma GCC unroll 8
      for (int c = 0; c < kBlock; c += n) store(to + i * kBlock + c, load_as<T>(pixel + c));
    }
    return;
  }
  for (int c = 0; c < plane.channels; c += n) {
    const int live = plane.channels - c < n ? plane.channels - c : n;
    const T* runs[n];
    for (int l = 0; l < n; ++l) runs[l] = from + (c + (l < live ? l : live - 1)) * plane.channel_stride;
    int64_t i = 0;
    for (; plane.pixel_stride == 1 && i + n <= count; i += n) {
      Vec<A> rows[n];
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) rows[l] = load_as<T>(runs[l] + i);
      transpose<A>(rows);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) store(to + (i + l) * kBlock + c, rows[l]);
    }
    for (; i < count; ++i) {
      for (int l = 0; l < n; ++l) to[i * kBlock + c + l] = static_cast<A>(runs[l][i * plane.pixel_stride]);
    }
  }
}

template <class T>
void write_pixels(const Plane<acc_t<T>>& plane, int64_t first, int64_t count, const acc_t<T>* from) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  T* to = static_cast<T*>(plane.data) + first * plane.pixel_stride;
  if (plane.channel_stride == 1 && plane.channels == kBlock) {
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < kBlock; c += n) store_as<T>(to + i * plane.pixel_stride + c, load(from + i * kBlock + c));
    }
    return;
  }
  for (int c = 0; c < plane.channels; c += n) {
    const int live = plane.channels - c < n ? plane.channels - c : n;
    T* target = to + c * plane.channel_stride;
    int64_t i = 0;
    for (; plane.pixel_stride == 1 && i + n <= count; i += n) {
      Vec<A> rows[n];
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) rows[l] = load(from + (i + l) * kBlock + c);
      transpose<A>(rows);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) {
        if (l < live) store_as<T>(target + l * plane.channel_stride + i, rows[l]);
      }
    }
    for (; i < count; ++i) {
      for (int l = 0; l < live; ++l) {
        target[i * plane.pixel_stride + l * plane.channel_stride] = static_cast<T>(from[i * kBlock + c + l]);
      }
    }
  }
}

// Block `block` of image n of a tensor with `total` channels and `pixels` pixels per image. Only a RowWriter writes to
// `tensor`, in spite of the const_cast.
template <class T>
PIXNORM_INLINE Plane<acc_t<T>> plane_of(const T* tensor, bool channels_last, int64_t total, int64_t pixels, int64_t n,
                                        int64_t block) {
  const int64_t c0 = block * kBlock;
  const int channels = static_cast<int>(total - c0 < kBlock ? total - c0 : kBlock);
  T* image = const_cast<T*>(tensor) + n * total * pixels;
  if (channels_last)
    return {image + c0, total, 1, total * pixels, channels, sizeof(T), read_pixels<T>, write_pixels<T>};
  return {image + c0 * pixels, 1, pixels, total * pixels, channels, sizeof(T), read_pixels<T>, write_pixels<T>};
}

// The same for a tensor of one channel, which all lanes of any block read.
template <class T>
PIXNORM_INLINE Plane<acc_t<T>> plane_of_one(const T* tensor, int64_t pixels, int64_t n) {
  T* image = const_cast<T*>(tensor) + n * pixels;
  return {image, 1, 0, pixels, kBlock, sizeof(T), read_pixels<T>, write_pixels<T>};
}

constexpr int64_t kBandPixels = 64;  // minimum of a band: runs long enough to stream from memory

constexpr int64_t band_rows(int64_t width) { return width >= kBandPixels ? 1 : (kBandPixels + width - 1) / width; }

// A bump allocator over scratch memory.
template <class A>
struct Arena {
  A* next;
  A* pixels(int64_t count) {
    A* piece = next;
    next += count * kBlock;
    return piece;
  }
};

// Reads rows of a plane up to `end`, from the top down, a band of rows at a time; then those of the next image.
//
// One reader, or writer, goes through all images of a tile: a new one for each image copies its plane with wide loads
// of what was stored in parts, and these wait until all earlier stores have reached the cache. With 8x8 pixels that was
// a third of the time.
template <class A>
class RowReader {
 public:
  RowReader(const Plane<A>& plane, int64_t width, int64_t end, A* band)
      : plane_(plane), width_(width), end_(end), band_(band) {}
  PIXNORM_INLINE const A* row(int64_t h) {
    if (h < begin_ || h >= stop_) {
      begin_ = h;
      stop_ = h + band_rows(width_) < end_ ? h + band_rows(width_) : end_;
      ahead_ = 0;
      plane_.read(plane_, begin_ * width_, (stop_ - begin_) * width_, band_);
    }
    return band_ + (h - begin_) * width_ * kBlock;
  }
  PIXNORM_INLINE void next_image() {
    plane_.next_image();
    begin_ = stop_ = 0;
  }
  // Prefetches a cache line of the next band, or of the next image's first band. Call it once per pixel, in between
  // arithmetic: the pixels of a block lie in many short runs that the hardware prefetcher does not predict, and reading
  // a band at once would stall.
  PIXNORM_INLINE void look_ahead() {
    constexpr int kLine = 64;
    const char* at = static_cast<const char*>(plane_.data);
    if (plane_.channel_stride == 1) {
      at += (stop_ * width_ + ahead_) * plane_.pixel_stride * plane_.element;
    } else {
      const int64_t from = stop_ < end_ ? stop_ * width_ : plane_.image_stride;
      at += (from + ahead_ % kBlock * plane_.channel_stride) * plane_.element + ahead_ / kBlock * kLine;
    }
    __builtin_prefetch(at);
    ++ahead_;
  }

 private:
  Plane<A> plane_;
  const int64_t width_, end_;
  int64_t begin_ = 0, stop_ = 0;  // the rows in the band
  int64_t ahead_ = 0;             // lines of the next band prefetched so far
  A* band_;
};

// Writes rows [begin, end) of a plane from the top down: fill row(h), then call done(h). Then those of the next image.
template <class A>
class RowWriter {
 public:
  RowWriter(const Plane<A>& plane, int64_t width, int64_t begin, int64_t end, A* band)
      : plane_(plane), width_(width), first_(begin), end_(end), begin_(begin), band_(band) {}
  PIXNORM_INLINE A* row(int64_t h) { return band_ + (h - begin_) * width_ * kBlock; }
  PIXNORM_INLINE void done(int64_t h) {
    if (h + 1 - begin_ == band_rows(width_) || h + 1 == end_) {
      plane_.write(plane_, begin_ * width_, (h + 1 - begin_) * width_, band_);
      begin_ = h + 1;
    }
  }
  PIXNORM_INLINE void next_image() {
    plane_.next_image();
    begin_ = first_;
  }

 private:
  Plane<A> plane_;
  const int64_t width_, first_, end_;
  int64_t begin_;  // the first row in the band
  A* band_;
};

// A ring buffer of kRows consecutive rows of an image. Each has `rows_each` sub-rows of `width` pixels with kPadding
// zero pixels at either end; rows outside the image are zero.
template <class A, int kRows, int kPadding>
class Ring {
 public:
  Ring(Arena<A>& arena, int64_t height, int64_t width, int rows_each = 1)
      : height_(height), pitch_(width + 2 * kPadding), rows_each_(rows_each) {
    slots_ = arena.pixels(size(width, rows_each));
    __builtin_memset(slots_, 0, size(width, rows_each) * kBlock * sizeof(A));
  }
  static constexpr int64_t size(int64_t width, int rows_each) {
    return (kRows * rows_each + 1) * (width + 2 * kPadding);
  }
  // Pixel 0 of sub-row `sub` of row h.
  PIXNORM_INLINE A* row(int64_t h, int sub = 0) const {
    const int64_t slot = h < 0 || h >= height_ ? kRows * rows_each_ : (h % kRows) * rows_each_ + sub;
    return slots_ + (slot * pitch_ + kPadding) * kBlock;
  }

 private:
  A* slots_;
  int64_t height_, pitch_;
  int rows_each_;
};
